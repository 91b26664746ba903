//! The tile registers of AMX: their shapes and the four instructions that a product needs.
//!
//! A tile is sixteen rows of 64 bytes at most. A product reads and writes eight of them: sums `C`
//! of two blocks of rows times two panels, and the operands `A` (a block of rows each) and `B` (a
//! panel each).

#[cfg(target_arch = "x86_64")]
use std::arch::asm;

/// Rows of a tile at most.
pub(super) const TILE_ROWS: usize = 16;
/// Bytes of a row of every tile: sixteen sums, or thirty-two links in bf16.
pub(super) const ROW_BYTES: usize = 64;

/// The sums of the first and the second block of rows, each times the first and second panel.
pub(super) const C: [[usize; 2]; 2] = [[0, 1], [2, 3]];
/// The two blocks of rows on the left.
pub(super) const A: [usize; 2] = [4, 5];
/// The two panels.
pub(super) const B: [usize; 2] = [6, 7];

/// What `ldtilecfg` reads: palette 1, and of each tile the bytes of a row and the number of rows.
#[derive(Clone, Copy, Default)]
#[repr(C, align(64))]
pub(super) struct Shapes {
    pub palette: u8,
    pub start_row: u8,
    reserved: [u8; 14],
    pub row_bytes: [u16; 16],
    pub rows: [u8; 16],
}

impl Shapes {
    /// Tiles for two blocks of `rows`, of which the second may be empty.
    pub(super) fn new(rows: [usize; 2]) -> Self {
        let mut shapes = Self { palette: 1, ..Self::default() };
        for (block, rows) in rows.into_iter().enumerate() {
            [C[block][0], C[block][1], A[block]].into_iter().for_each(|t| shapes.set(t, rows));
        }
        B.into_iter().for_each(|tile| shapes.set(tile, TILE_ROWS));
        shapes
    }

    fn set(&mut self, tile: usize, rows: usize) {
        self.rows[tile] = rows as u8;
        self.row_bytes[tile] = if rows == 0 { 0 } else { ROW_BYTES as u16 };
    }
}

/// Eight tile registers. Tiles are named by constants because instructions hold their numbers.
pub(super) trait Tiles {
    /// Gives the tiles their shapes; what they held is lost.
    ///
    /// # Safety
    /// The machine has these tiles.
    unsafe fn configure(&mut self, shapes: &Shapes);

    /// Reads the rows of tile `T`, `stride` bytes apart (0: the same row again and again).
    ///
    /// # Safety
    /// The tile has a shape, and so many rows are there to read.
    unsafe fn load<const T: usize>(&mut self, from: *const u8, stride: usize);

    /// Adds to tile `C` the products of the pairs of bf16 in `A`, a row each, and `B`, a pair of
    /// rows each.
    ///
    /// # Safety
    /// The tiles have shapes that fit.
    unsafe fn multiply<const C: usize, const A: usize, const B: usize>(&mut self);

    /// Writes the rows of tile `T`, `stride` bytes apart.
    ///
    /// # Safety
    /// The tile has a shape, and so many rows may be written.
    unsafe fn store<const T: usize>(&mut self, to: *mut u8, stride: usize);
}

/// The tiles of this thread, released when dropped.
///
/// The compiler does not know of tile registers, so nothing needs to be declared as clobbered; it
/// keeps the order of the instructions and of memory accesses around them because none of the
/// blocks is `pure` or `nomem`.
#[cfg(target_arch = "x86_64")]
pub(super) struct Amx(());

#[cfg(target_arch = "x86_64")]
impl Amx {
    /// # Safety
    /// [`multiplies_tiles`](super::dispatch::CpuLevel::multiplies_tiles) holds, and this is the
    /// thread's only `Amx`.
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

#[cfg(target_arch = "x86_64")]
impl Drop for Amx {
    fn drop(&mut self) {
        // SAFETY: who made this promised that the machine has tiles.
        unsafe { asm!("tilerelease", options(nostack, preserves_flags)) }
    }
}

#[cfg(target_arch = "x86_64")]
impl Tiles for Amx {
    #[inline(always)]
    unsafe fn configure(&mut self, shapes: &Shapes) {
        let shapes: *const Shapes = shapes;
        // SAFETY: 64 valid bytes; the caller's promise.
        unsafe { asm!("ldtilecfg [{}]", in(reg) shapes, options(nostack, preserves_flags)) }
    }

    #[inline(always)]
    unsafe fn load<const T: usize>(&mut self, from: *const u8, stride: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            asm!(
                "tileloadd tmm{t}, [{from} + {stride}*1]",
                t = const T,
                from = in(reg) from,
                stride = in(reg) stride,
                options(nostack, preserves_flags)
            );
        }
    }

    #[inline(always)]
    unsafe fn multiply<const C: usize, const A: usize, const B: usize>(&mut self) {
        // SAFETY: the caller's promise.
        unsafe {
            asm!(
                "tdpbf16ps tmm{c}, tmm{a}, tmm{b}",
                c = const C,
                a = const A,
                b = const B,
                options(nostack, preserves_flags)
            );
        }
    }

    #[inline(always)]
    unsafe fn store<const T: usize>(&mut self, to: *mut u8, stride: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            asm!(
                "tilestored [{to} + {stride}*1], tmm{t}",
                t = const T,
                to = in(reg) to,
                stride = in(reg) stride,
                options(nostack, preserves_flags)
            );
        }
    }
}
