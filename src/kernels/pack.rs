//! A frozen weight matrix, kept once, in the layout that the matmul reads.

use half::bf16;
use rayon::prelude::*;

use super::lanes::LANES;

/// One input feature of a panel: its weights to sixteen output features.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct RowF32(pub(crate) [f32; LANES]);

impl RowF32 {
    /// The weights of all `rows`, one after the other.
    pub(crate) fn elements(rows: &[Self]) -> &[f32] {
        // SAFETY: a row is sixteen floats without padding.
        unsafe { std::slice::from_raw_parts(rows.as_ptr().cast(), rows.len() * LANES) }
    }

    /// As [`RowF32::elements`], to write.
    pub(crate) fn elements_mut(rows: &mut [Self]) -> &mut [f32] {
        // SAFETY: a row is sixteen floats without padding.
        unsafe { std::slice::from_raw_parts_mut(rows.as_mut_ptr().cast(), rows.len() * LANES) }
    }
}

/// Two input features of a panel: their weights to sixteen output features in bf16 bits, the two of
/// each output side by side. This is what instructions that multiply pairs of bf16 read.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct PairRow(pub(crate) [u16; 2 * LANES]);

impl PairRow {
    /// Zeros.
    pub(crate) const ZERO: Self = Self([0; 2 * LANES]);
}

/// The panels: `[out / 16][in][16]`, or `[out / 16][in / 2][16][2]` with an odd `in` padded.
#[derive(Clone)]
pub(crate) enum Storage {
    F32(Vec<RowF32>),
    Bf16(Vec<PairRow>),
}

/// A frozen weight `W [out, in]` in panels of sixteen output rows, the last panel padded with
/// zeros, stored as `f32` (`[out / 16][in][16]`) or bf16 (`[out / 16][in / 2][16][2]`).
#[derive(Clone)]
pub struct PackedMatrix {
    out_features: usize,
    in_features: usize,
    pub(crate) storage: Storage,
}

impl PackedMatrix {
    /// Packs row-major `w [out, in]` and keeps it in `f32`. Panics unless `w` has that many
    /// elements and at least one.
    pub fn from_f32(w: &[f32], out: usize, in_: usize) -> Self {
        let put = |rows: &mut [RowF32], lane: usize, i: usize, x| rows[i].0[lane] = x;
        let rows = pack(w, (out, in_), in_, RowF32([0.0; LANES]), put);
        Self { out_features: out, in_features: in_, storage: Storage::F32(rows) }
    }

    /// Packs row-major `w [out, in]`, rounded to the nearest bf16 (ties to even).
    pub fn from_f32_as_bf16(w: &[f32], out: usize, in_: usize) -> Self {
        Self::pairs(w, out, in_, |x| bf16::from_f32(x).to_bits())
    }

    /// Packs row-major `w [out, in]` of bf16 as it is.
    pub fn from_bf16(w: &[bf16], out: usize, in_: usize) -> Self {
        Self::pairs(w, out, in_, bf16::to_bits)
    }

    fn pairs<T: Copy + Sync>(
        w: &[T],
        out: usize,
        in_: usize,
        bits: impl Fn(T) -> u16 + Sync,
    ) -> Self {
        let put = |rows: &mut [PairRow], lane: usize, i: usize, x| {
            rows[i / 2].0[2 * lane + i % 2] = bits(x);
        };
        let rows = pack(w, (out, in_), in_.div_ceil(2), PairRow::ZERO, put);
        Self { out_features: out, in_features: in_, storage: Storage::Bf16(rows) }
    }

    /// Rows of W.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Columns of W.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// Memory held, padding included.
    pub fn bytes(&self) -> usize {
        match &self.storage {
            Storage::F32(rows) => size_of_val(rows.as_slice()),
            Storage::Bf16(rows) => size_of_val(rows.as_slice()),
        }
    }

    /// Whether the storage is bf16.
    pub fn is_bf16(&self) -> bool {
        matches!(self.storage, Storage::Bf16(_))
    }

    /// Copies row `i` of W (an embedding, where the matrix is a tied head) into `into [in]`.
    pub fn row(&self, i: usize, into: &mut [f32]) {
        assert!(i < self.out_features && into.len() == self.in_features);
        let (panel, lane) = (i / LANES, i % LANES);
        match &self.storage {
            Storage::F32(rows) => {
                let rows = &rows[panel * self.in_features..];
                into.iter_mut().zip(rows).for_each(|(to, row)| *to = row.0[lane]);
            }
            Storage::Bf16(rows) => {
                let rows = &rows[panel * self.in_features.div_ceil(2)..];
                into.chunks_mut(2).zip(rows).for_each(|(to, row)| {
                    let pair = row.0[2 * lane..].iter();
                    to.iter_mut().zip(pair).for_each(|(to, x)| *to = bf16::from_bits(*x).to_f32());
                });
            }
        }
    }

    /// W again, row-major `[out, in]`.
    pub fn unpack(&self) -> Vec<f32> {
        let mut w = vec![0.0; self.out_features * self.in_features];
        let rows = w.par_chunks_mut(self.in_features).enumerate();
        rows.for_each(|(i, row)| self.row(i, row));
        w
    }
}

/// Elements below which packing is not worth a second thread.
const SMALL: usize = 1 << 16;

/// Lays `w [out, in]` out in panels of `panel_rows` rows that start as `zero`; `put` sets lane,
/// input feature and weight in a panel.
fn pack<T: Copy + Sync, R: Copy + Send + Sync>(
    w: &[T],
    (out, in_): (usize, usize),
    panel_rows: usize,
    zero: R,
    put: impl Fn(&mut [R], usize, usize, T) + Sync,
) -> Vec<R> {
    assert!(out > 0 && in_ > 0 && w.len() == out * in_, "weight is not a matrix [out, in]");
    let mut rows = vec![zero; out.div_ceil(LANES) * panel_rows];
    let fill = |(panel, w): (&mut [R], &[T])| {
        for (lane, w) in w.chunks(in_).enumerate() {
            w.iter().enumerate().for_each(|(i, &x)| put(panel, lane, i, x));
        }
    };
    if w.len() < SMALL {
        rows.chunks_mut(panel_rows).zip(w.chunks(LANES * in_)).for_each(fill);
    } else {
        rows.par_chunks_mut(panel_rows).zip(w.par_chunks(LANES * in_)).for_each(fill);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn unpack_gives_back_what_was_packed(out in 1usize..40, in_ in 1usize..20, seed: u32) {
            let w: Vec<f32> = (0..out * in_).map(|i| (i as f32 + seed as f32).sin()).collect();
            prop_assert_eq!(PackedMatrix::from_f32(&w, out, in_).unpack(), w.clone());
            let rounded: Vec<bf16> = w.iter().map(|&x| bf16::from_f32(x)).collect();
            let wide: Vec<f32> = rounded.iter().map(|x| x.to_f32()).collect();
            prop_assert_eq!(PackedMatrix::from_f32_as_bf16(&w, out, in_).unpack(), wide.clone());
            prop_assert_eq!(PackedMatrix::from_bf16(&rounded, out, in_).unpack(), wide);
        }
    }

    #[test]
    fn bytes_count_the_padded_panels() {
        let w = vec![1.0; 17 * 5];
        assert_eq!(PackedMatrix::from_f32(&w, 17, 5).bytes(), 2 * 16 * 5 * 4);
        assert_eq!(PackedMatrix::from_f32_as_bf16(&w, 17, 5).bytes(), 2 * 16 * 6 * 2);
    }

    #[test]
    fn row_is_the_row_of_the_matrix() {
        let w: Vec<f32> = (0..18 * 3).map(|i| i as f32).collect();
        let mut row = [0.0; 3];
        PackedMatrix::from_f32(&w, 18, 3).row(17, &mut row);
        assert_eq!(row, [51.0, 52.0, 53.0]);
    }
}
