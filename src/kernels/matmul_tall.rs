//! The inner loop of tall strips on AVX-512, in assembly: twelve or eight rows times two panels.
//!
//! The compiler computes the address of each row at each link, and where it may take several links at
//! once it keeps numbers on the stack. Here four links share their addresses, so that a link is two
//! loads, twelve broadcasts and 24 multiply-adds: the fewer instructions, the less it matters that
//! another thread shares the core. Each sum is the same chain as in `matmul_tile`, and so the same bits.
//! Pairs of integers (`matmul_vnni`) are as wide as a link of `f32` and take the same code.

use std::arch::asm;
use std::arch::x86_64::*;

use super::lanes::LANES;
use super::matmul_block_float::Integers;
use super::matmul_tile::Strip;
use super::pack::PairRow;

/// Rows of a tile at most; with two panels, 24 sums stay in registers.
pub(crate) const ROWS: usize = 12;
/// Rows of a lower tile; fewer do not keep the multipliers busy.
const LOW_ROWS: usize = 8;
/// Panels of a tile.
pub(crate) const PANELS: usize = 2;
/// Links that share their addresses.
pub(crate) const LINKS: usize = 4;

/// A row of the link `at` bytes from the row's place: both panels' products are added to its two sums.
macro_rules! row {
    ($add:literal, $at:literal, $row:literal, $a:literal, $sum0:literal, $sum1:literal) => {
        concat!(
            concat!("vbroadcastss zmm", $a, ", dword ptr [", $row, " + ", $at, "]\n"),
            concat!($add, " zmm", $sum0, ", zmm0, zmm", $a, "\n"),
            concat!($add, " zmm", $sum1, ", zmm1, zmm", $a, "\n"),
        )
    };
}

/// All rows of the link `at` bytes from the rows' places; the panels' numbers are in registers 0 and 1.
macro_rules! rows {
    (low, $add:literal, $at:literal) => {
        concat!(
            row!($add, $at, "{row0}", 3, 8, 9),
            row!($add, $at, "{row0} + {lda}", 4, 10, 11),
            row!($add, $at, "{row0} + 2 * {lda}", 5, 12, 13),
            row!($add, $at, "{row3}", 6, 14, 15),
            row!($add, $at, "{row3} + {lda}", 7, 16, 17),
            row!($add, $at, "{row3} + 2 * {lda}", 3, 18, 19),
            row!($add, $at, "{row6}", 4, 20, 21),
            row!($add, $at, "{row6} + {lda}", 5, 22, 23),
        )
    };
    (high, $add:literal, $at:literal) => {
        concat!(
            rows!(low, $add, $at),
            row!($add, $at, "{row6} + 2 * {lda}", 6, 24, 25),
            row!($add, $at, "{row9}", 7, 26, 27),
            row!($add, $at, "{row9} + {lda}", 3, 28, 29),
            row!($add, $at, "{row9} + 2 * {lda}", 4, 30, 31),
        )
    };
}

/// Reads a line of both panels by an instruction with operands before and behind the line.
macro_rules! read {
    ($instruction:literal, $before:literal, $line:literal, $behind:literal) => {
        concat!(
            concat!($instruction, " zmm0, ", $before),
            concat!("zmmword ptr [{b} + ", $line, "]", $behind, "\n"),
            concat!($instruction, " zmm1, ", $before),
            concat!("zmmword ptr [{b} + {stride} + ", $line, "]", $behind, "\n"),
        )
    };
}

/// Writes a link of both panels as `f32`.
macro_rules! keep {
    ($kept:literal) => {
        concat!(
            concat!("vmovups zmmword ptr [{kept} + ", $kept, "], zmm0\n"),
            concat!("vmovups zmmword ptr [{kept} + {kept_stride} + ", $kept, "], zmm1\n"),
        )
    };
}

/// The link `at` bytes from the rows' places, of panels of `f32` or of pairs of integers.
macro_rules! link {
    ($height:ident, $add:literal, $at:literal, $line:literal) => {
        concat!(read!("vmovups", "", $line, ""), rows!($height, $add, $at))
    };
}

/// Four such links, with code before and between them.
macro_rules! links {
    ($height:ident, $add:literal, $before:literal, $between:literal) => {
        concat!(
            $before,
            link!($height, $add, 0, 0),
            link!($height, $add, 4, 64),
            $between,
            link!($height, $add, 8, 128),
            link!($height, $add, 12, 192),
        )
    };
}

/// The first link of a line of bf16 pairs, their lower halves, which is kept.
macro_rules! even {
    ($height:ident, $at:literal, $line:literal, $kept:literal) => {
        concat!(
            read!("vpslld", "", $line, ", 16"),
            keep!($kept),
            rows!($height, "vfmadd231ps", $at)
        )
    };
}

/// The second link of a line of bf16 pairs, their upper halves, which is kept.
macro_rules! odd {
    ($height:ident, $at:literal, $line:literal, $kept:literal) => {
        concat!(
            read!("vpandd", "zmm2, ", $line, ""),
            keep!($kept),
            rows!($height, "vfmadd231ps", $at)
        )
    };
}

/// Four links of bf16 panels, which are kept.
macro_rules! widened_links {
    ($height:ident) => {
        concat!(
            even!($height, 0, 0, 0),
            odd!($height, 4, 0, 64),
            even!($height, 8, 64, 128),
            odd!($height, 12, 64, 192),
            "add {kept}, 256\n"
        )
    };
}

/// Fetches a line of both panels of the next strip.
macro_rules! fetch {
    ($line:literal) => {
        concat!(
            concat!("prefetcht0 byte ptr [{ahead} + ", $line, "]\n"),
            concat!("prefetcht0 byte ptr [{ahead} + {stride} + ", $line, "]\n"),
        )
    };
}

/// Hands `$finish` the strip and each sum with its row and panel; one by one, so that they stay in registers.
macro_rules! finish {
    (low, $($names:ident),*) => {
        finish!($($names),*, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    (high, $($names:ident),*) => {
        finish!($($names),*, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23)
    };
    ($finish:ident, $strip:ident, $sum:ident, $($i:literal)*) => {
        $($finish($strip, $i / PANELS, $i % PANELS, $sum[$i]);)*
    };
}

/// Adds the old number to a sum and writes it.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn add<B>(strip: &Strip<f32, B>, row: usize, panel: usize, sum: __m512) {
    // SAFETY: the place is inside the shapes stated by the fields.
    unsafe {
        let old = _mm512_loadu_ps(strip.init.add(row * strip.ldi + panel * LANES));
        let y = strip.y.add(row * strip.ldy + panel * LANES);
        _mm512_storeu_ps(y, _mm512_add_ps(old, sum));
    }
}

/// As [`add`], of a sum of integers.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn add_scaled(strip: &Strip<Integers, PairRow>, row: usize, panel: usize, sum: __m512) {
    // SAFETY: the caller's promise.
    unsafe { strip.add_scaled(row, panel, _mm512_castps_si512(sum)) }
}

/// A tile of a height: `$links` is the code of four links, `$fetches` that which fetches the next strip's,
/// `$bytes` the length of a panel's part of them, and `$finish` takes its sums; further operands follow.
macro_rules! tile_of_height {
    ($height:ident, $finish:ident, $strip:ident, $fetches:expr, $links:expr, $bytes:literal, $($operands:tt)*) => {{
        let mut sum = [_mm512_setzero_ps(); ROWS * PANELS];
        let row = |i: usize| $strip.a.wrapping_add(i * $strip.lda);
        let ahead = $strip.b.wrapping_add($strip.ahead);
        asm!(
            "2:",
            "cmp {b}, {ahead}",
            "je 3f",
            $fetches,
            "3:",
            $links,
            concat!("add {b}, ", $bytes),
            concat!("add {ahead}, ", $bytes),
            "add {row0}, 16",
            "add {row3}, 16",
            "add {row6}, 16",
            "add {row9}, 16",
            "dec {steps}",
            "jnz 2b",
            b = inout(reg) $strip.b => _,
            ahead = inout(reg) ahead => _,
            stride = in(reg) bytes($strip.b, $strip.panel_stride),
            row0 = inout(reg) row(0) => _,
            row3 = inout(reg) row(3) => _,
            row6 = inout(reg) row(6) => _,
            row9 = inout(reg) row(9) => _,
            lda = in(reg) bytes($strip.a, $strip.lda),
            steps = inout(reg) $strip.k / LINKS => _,
            $($operands)*
            out("zmm0") _, out("zmm1") _,
            inout("zmm2") _mm512_set1_epi32(0xffff_0000_u32 as i32) => _,
            out("zmm3") _, out("zmm4") _, out("zmm5") _, out("zmm6") _, out("zmm7") _,
            inout("zmm8") sum[0], inout("zmm9") sum[1], inout("zmm10") sum[2],
            inout("zmm11") sum[3], inout("zmm12") sum[4], inout("zmm13") sum[5],
            inout("zmm14") sum[6], inout("zmm15") sum[7], inout("zmm16") sum[8],
            inout("zmm17") sum[9], inout("zmm18") sum[10], inout("zmm19") sum[11],
            inout("zmm20") sum[12], inout("zmm21") sum[13], inout("zmm22") sum[14],
            inout("zmm23") sum[15], inout("zmm24") sum[16], inout("zmm25") sum[17],
            inout("zmm26") sum[18], inout("zmm27") sum[19], inout("zmm28") sum[20],
            inout("zmm29") sum[21], inout("zmm30") sum[22], inout("zmm31") sum[23],
            options(nostack),
        );
        finish!($height, $finish, $strip, sum);
    }};
}

/// [`tile_of_height`] of [`tile_rows`], the code of four links being a macro that takes the height first.
macro_rules! tile {
    ($finish:ident, $strip:ident, $fetches:expr, $links:ident ! ($($text:literal),*), $($more:tt)*) => {{
        debug_assert!(tile_rows($strip.rows) > 0);
        match tile_rows($strip.rows) {
            LOW_ROWS => {
                tile_of_height!(low, $finish, $strip, $fetches, $links!(low $(, $text)*), $($more)*)
            }
            _ => tile_of_height!(high, $finish, $strip, $fetches, $links!(high $(, $text)*), $($more)*),
        }
    }};
}

/// The bytes of so many elements.
fn bytes<T>(_: *const T, elements: usize) -> usize {
    elements * size_of::<T>()
}

/// How many rows the next tile of a strip of so many takes: twelve, or eight of eight and of sixteen, so that four are
/// left to no slower tile; 0 if such tiles take none.
pub(crate) fn tile_rows(rows: usize) -> usize {
    match rows {
        LOW_ROWS => LOW_ROWS,
        0..ROWS => 0,
        _ if rows == 2 * LOW_ROWS => LOW_ROWS,
        _ => ROWS,
    }
}

/// Computes the first [`tile_rows`] of a strip with two `f32` panels and a multiple of four links.
///
/// # Safety
/// As [`multiply`](super::matmul_tile::multiply), with so many rows, panels and links; the machine has
/// AVX-512 F.
#[target_feature(enable = "avx512f")]
pub(crate) unsafe fn multiply_f32(strip: &Strip<f32, f32>) {
    // SAFETY: the caller's promise; all offsets are inside the shapes stated by the fields.
    unsafe {
        tile!(
            add,
            strip,
            concat!(fetch!(0), fetch!(64), fetch!(128), fetch!(192)),
            links!("vfmadd231ps", "", ""),
            256,
        );
    }
}

/// As [`multiply_f32`]; for every four links the next line from `fetch` on, whose address need not be valid,
/// is fetched instead of what lies ahead of the strip.
///
/// # Safety
/// As [`multiply_f32`].
#[target_feature(enable = "avx512f")]
pub(crate) unsafe fn multiply_f32_fetching(strip: &Strip<f32, f32>, fetch: *const u16) {
    // SAFETY: as above.
    unsafe {
        tile!(
            add,
            strip,
            "",
            links!("vfmadd231ps", "prefetcht0 byte ptr [{fetch}]\n", "add {fetch}, 64\n"),
            256,
            fetch = inout(reg) fetch => _,
        );
    }
}

/// As [`multiply_f32`], with bf16 panels, which are written to `kept` as `f32` panels on the way.
///
/// # Safety
/// As [`multiply_f32`]; `kept` has room for both panels.
#[target_feature(enable = "avx512f")]
pub(crate) unsafe fn multiply_bf16(strip: &Strip<f32, u16>, kept: *mut f32) {
    // SAFETY: as above.
    unsafe {
        tile!(
            add,
            strip,
            concat!(fetch!(0), fetch!(64)),
            widened_links!(),
            128,
            kept = inout(reg) kept => _,
            kept_stride = in(reg) bytes(strip.a, strip.k * LANES),
        );
    }
}

/// Computes the first [`tile_rows`] of a strip of integers with two panels and a multiple of four pairs of
/// links, of which `strip.k` is the number; for every four the next line from either of `fetch` on, whose
/// addresses need not be valid, is fetched.
///
/// # Safety
/// As [`multiply`](super::matmul_vnni::multiply), with so many rows, panels and links.
#[target_feature(enable = "avx512f,avx512vnni")]
pub(crate) unsafe fn multiply_integers(strip: &Strip<Integers, PairRow>, fetch: [*const u8; 2]) {
    // SAFETY: the caller's promise; all offsets are inside the shapes stated by the fields.
    unsafe {
        tile!(
            add_scaled,
            strip,
            "",
            links!(
                "vpdpwssd",
                "prefetcht1 byte ptr [{fetch0}]\nprefetcht1 byte ptr [{fetch1}]\n",
                "add {fetch0}, 64\nadd {fetch1}, 64\n"
            ),
            256,
            fetch0 = inout(reg) fetch[0] => _,
            fetch1 = inout(reg) fetch[1] => _,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_leave_rows_to_a_lower_one_where_they_can() {
        let tiles = |mut rows: usize| {
            let mut all = Vec::new();
            while tile_rows(rows) > 0 {
                all.push(tile_rows(rows));
                rows -= tile_rows(rows);
            }
            (all, rows)
        };
        assert_eq!(tiles(64), (vec![12, 12, 12, 12, 8, 8], 0));
        assert_eq!(tiles(20), (vec![12, 8], 0));
        assert_eq!(tiles(8), (vec![8], 0));
        assert_eq!(tiles(26), (vec![12, 12], 2));
        assert_eq!(tiles(11), (vec![], 11));
        // as many rows as four tiles fetch in
        assert!((60..300).all(|rows| tiles(rows).0.len() >= 5));
    }
}
