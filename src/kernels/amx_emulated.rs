//! AMX tiles in software, for tests on machines without them: what Intel's manual says that the
//! instructions do, with a panic where they would fault.

use super::amx_tiles::{ROW_BYTES, Shapes, TILE_ROWS, Tiles};

/// A row of a tile as dwords.
type Row = [u32; ROW_BYTES / 4];

/// Eight tiles, without a shape at first.
#[derive(Default)]
pub(super) struct Emulated {
    shapes: Shapes,
    tiles: [[Row; TILE_ROWS]; 8],
}

impl Emulated {
    /// Rows and dwords of a row.
    fn shape(&self, tile: usize) -> (usize, usize) {
        let shape = (usize::from(self.shapes.rows[tile]), usize::from(self.shapes.row_bytes[tile]));
        assert!(shape.0 > 0 && shape.1 > 0, "tile {tile} has no shape");
        (shape.0, shape.1 / 4)
    }
}

impl Tiles for Emulated {
    unsafe fn configure(&mut self, shapes: &Shapes) {
        // SAFETY: sixty-four bytes without padding.
        let bytes = unsafe { *std::ptr::from_ref(shapes).cast::<[u8; 64]>() };
        assert!(bytes[0] == 1 && bytes[1..16].iter().all(|x| *x == 0), "palette 1 from row 0");
        for tile in 0..16 {
            let row_bytes = u16::from_le_bytes([bytes[16 + 2 * tile], bytes[17 + 2 * tile]]);
            let rows = bytes[48 + tile];
            assert!(row_bytes <= 64 && rows <= 16 && (row_bytes == 0) == (rows == 0));
            assert!(tile < 8 || rows == 0, "palette 1 has eight tiles");
        }
        *self = Self { shapes: *shapes, ..Self::default() };
    }

    unsafe fn load<const T: usize>(&mut self, from: *const u8, stride: usize) {
        let (rows, dwords) = self.shape(T);
        self.tiles[T] = Default::default();
        for (i, row) in self.tiles[T][..rows].iter_mut().enumerate() {
            for (j, x) in row[..dwords].iter_mut().enumerate() {
                // SAFETY: the caller's promise.
                *x = unsafe { from.add(i * stride + 4 * j).cast::<u32>().read_unaligned() };
            }
        }
    }

    unsafe fn multiply<const C: usize, const A: usize, const B: usize>(&mut self) {
        let [(rows, columns), a, b] = [C, A, B].map(|tile| self.shape(tile));
        assert!(a == (rows, b.0) && b.1 == columns, "shapes {rows} x {columns}, {a:?}, {b:?}");
        assert!(C != A && C != B && A != B, "the same tile twice");
        for i in 0..rows {
            let mut sums = [[0f32; 2]; ROW_BYTES / 4];
            for k in 0..b.0 {
                let [a_even, a_odd] = pair(self.tiles[A][i][k]);
                for (sum, b) in sums.iter_mut().zip(self.tiles[B][k]) {
                    let [b_even, b_odd] = pair(b);
                    // a product of two bf16 is exact, so this is a fused multiply-add
                    sum[0] = flush(sum[0] + a_even * b_even);
                    sum[1] = flush(sum[1] + a_odd * b_odd);
                }
            }
            for (to, sum) in self.tiles[C][i][..columns].iter_mut().zip(sums) {
                *to = flush(flush(f32::from_bits(*to)) + flush(sum[0] + sum[1])).to_bits();
            }
        }
    }

    unsafe fn store<const T: usize>(&mut self, to: *mut u8, stride: usize) {
        let (rows, dwords) = self.shape(T);
        for (i, row) in self.tiles[T][..rows].iter().enumerate() {
            for (j, x) in row[..dwords].iter().enumerate() {
                // SAFETY: the caller's promise.
                unsafe { to.add(i * stride + 4 * j).cast::<u32>().write_unaligned(*x) };
            }
        }
    }
}

/// The two bf16 of a dword, subnormal numbers as zero.
fn pair(bits: u32) -> [f32; 2] {
    [flush(f32::from_bits(bits << 16)), flush(f32::from_bits(bits & 0xffff_0000))]
}

/// Zero for subnormal numbers.
fn flush(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { 0.0f32.copysign(x) } else { x }
}
