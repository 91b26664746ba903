//! A frozen weight matrix, kept once, in the layout that the matmul reads.

use std::mem::MaybeUninit;
#[cfg(target_arch = "x86_64")]
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use half::bf16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use super::lanes::LANES;
#[cfg(any(target_arch = "x86_64", test))]
use super::slices::room_of;

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

    /// The weights of some rows.
    pub(crate) fn elements<const ROWS: usize>(rows: &[Self; ROWS]) -> &[[u16; 2 * LANES]; ROWS] {
        // SAFETY: a row is its array, without padding.
        unsafe { &*rows.as_ptr().cast() }
    }

    /// As [`PairRow::elements`], to write.
    pub(crate) fn elements_mut<const ROWS: usize>(
        rows: &mut [Self; ROWS],
    ) -> &mut [[u16; 2 * LANES]; ROWS] {
        // SAFETY: a row is its array, without padding.
        unsafe { &mut *rows.as_mut_ptr().cast() }
    }
}

/// The panels: `[out / 16][in][16]`, or `[out / 16][in / 2][16][2]` with an odd `in` padded.
pub(crate) enum Storage {
    F32(Vec<RowF32>),
    Bf16(Vec<PairRow>),
}

/// Which axis of the weight the result of a product has.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Axis {
    /// `x W^T`.
    Output,
    /// `dy W`.
    Input,
}

impl Axis {
    /// Links of a product with `w`.
    pub(crate) fn links(self, w: &PackedMatrix) -> usize {
        match self {
            Axis::Output => w.in_features(),
            Axis::Input => w.out_features(),
        }
    }

    /// Columns of its result.
    pub(crate) fn columns(self, w: &PackedMatrix) -> usize {
        match self {
            Axis::Output => w.out_features(),
            Axis::Input => w.in_features(),
        }
    }
}

/// A frozen weight `W [out, in]` in panels of sixteen output rows, the last panel padded with
/// zeros, stored as `f32` (`[out / 16][in][16]`) or bf16 (`[out / 16][in / 2][16][2]`).
pub struct PackedMatrix {
    out_features: usize,
    in_features: usize,
    pub(crate) storage: Storage,
    /// What [`PackedMatrix::units`] gives for either axis.
    #[cfg(target_arch = "x86_64")]
    units: [OnceLock<Vec<RowF32>>; 2],
    /// What [`PackedMatrix::rounded`] gives.
    #[cfg(target_arch = "x86_64")]
    rounded: Mutex<Weak<Vec<PairRow>>>,
}

impl PackedMatrix {
    /// Packs `W [out, in]` in `f32`, of which `read` writes row `i` into `[in]`. Panics if W is
    /// empty.
    pub fn f32_rows(out: usize, in_: usize, read: impl Fn(usize, &mut [f32]) + Sync) -> Self {
        Self::new(out, in_, Storage::F32(pack(out, in_, read)))
    }

    /// As [`PackedMatrix::f32_rows`], in bf16.
    pub fn bf16_rows(out: usize, in_: usize, read: impl Fn(usize, &mut [bf16]) + Sync) -> Self {
        Self::new(out, in_, Storage::Bf16(pack(out, in_, read)))
    }

    fn new(out_features: usize, in_features: usize, storage: Storage) -> Self {
        Self {
            out_features,
            in_features,
            storage,
            #[cfg(target_arch = "x86_64")]
            units: Default::default(),
            #[cfg(target_arch = "x86_64")]
            rounded: Default::default(),
        }
    }

    /// Packs row-major `w [out, in]` and keeps it in `f32`. Panics unless `w` has that many
    /// elements.
    pub fn from_f32(w: &[f32], out: usize, in_: usize) -> Self {
        assert!(w.len() == out * in_, "weight is not a matrix [out, in]");
        Self::f32_rows(out, in_, |i, row| row.copy_from_slice(&w[i * in_..][..in_]))
    }

    /// As [`PackedMatrix::from_f32`], rounded to the nearest bf16 (ties to even).
    pub fn from_f32_as_bf16(w: &[f32], out: usize, in_: usize) -> Self {
        assert!(w.len() == out * in_, "weight is not a matrix [out, in]");
        Self::bf16_rows(out, in_, |i, row| row.convert_from_f32_slice(&w[i * in_..][..in_]))
    }

    /// Rows of W.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Columns of W.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// Memory that the weights take, padding included.
    pub fn bytes(&self) -> usize {
        match &self.storage {
            Storage::F32(rows) => size_of_val(rows.as_slice()),
            Storage::Bf16(rows) => size_of_val(rows.as_slice()),
        }
    }

    /// The units of the weight's blocks as integers, seen along an axis (`matmul_block_float`), made when a
    /// product first asks for them.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn units(&self, axis: Axis, make: impl FnOnce() -> Vec<RowF32>) -> &[RowF32] {
        self.units[axis as usize].get_or_init(make)
    }

    /// The weight's integers (`matmul_rounded`), if somebody holds them.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn rounded(&self) -> Option<Arc<Vec<PairRow>>> {
        self.rounded.lock().unwrap_or_else(PoisonError::into_inner).upgrade()
    }

    /// As [`PackedMatrix::rounded`], made where nobody holds them.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn rounded_or(&self, make: impl FnOnce() -> Vec<PairRow>) -> Arc<Vec<PairRow>> {
        let mut held = self.rounded.lock().unwrap_or_else(PoisonError::into_inner);
        held.upgrade().unwrap_or_else(|| {
            let rows = Arc::new(make());
            *held = Arc::downgrade(&rows);
            rows
        })
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

    /// The transpose `[in, out]`, stored alike. Its product with a row has the bits of
    /// [`matmul_input_grad`](super::matmul::matmul_input_grad), and spares it the transposing of panels.
    pub fn transposed(&self) -> Self {
        match &self.storage {
            Storage::F32(rows) => Self::f32_rows(self.in_features, self.out_features, |i, into| {
                for (to, panel) in into.chunks_mut(LANES).zip(rows.chunks(self.in_features)) {
                    to.copy_from_slice(&panel[i].0[..to.len()]);
                }
            }),
            Storage::Bf16(rows) => {
                Self::bf16_rows(self.in_features, self.out_features, |i, into| {
                    let panels = rows.chunks(self.in_features.div_ceil(2));
                    for (to, panel) in into.chunks_mut(LANES).zip(panels) {
                        let links = panel[i / 2].0[i % 2..].iter().step_by(2);
                        to.iter_mut().zip(links).for_each(|(to, x)| *to = bf16::from_bits(*x));
                    }
                })
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

/// A row of a panel, made of the weights of `LINKS` input features.
trait PanelRow<E, const LINKS: usize>: Send {
    fn new(weights: [[E; LINKS]; LANES]) -> Self;
}

impl PanelRow<f32, 1> for RowF32 {
    fn new(weights: [[f32; 1]; LANES]) -> Self {
        Self(weights.map(|[x]| x))
    }
}

impl PanelRow<bf16, 2> for PairRow {
    fn new(weights: [[bf16; 2]; LANES]) -> Self {
        let mut row = Self::ZERO;
        row.0.iter_mut().zip(weights.as_flattened()).for_each(|(to, x)| *to = x.to_bits());
        row
    }
}

/// Asks the system for pages of 2 MiB where a large matrix and its neighbours lie, so that a product looks up
/// fewer places of pages; up to 2 MiB at either end may become resident with it. Systems that have none go
/// on with what they have.
fn ask_for_huge_pages<T>(start: *const T, len: usize) {
    #[cfg(target_os = "linux")]
    if len * size_of::<T>() >= WORTH_HUGE_PAGES {
        const HUGE_PAGE: usize = 2 << 20;
        let end = start.addr() + len * size_of::<T>();
        let (from, to) = (start.addr() / HUGE_PAGE, end.div_ceil(HUGE_PAGE));
        // SAFETY: advice on the kind of pages, which changes no content, neither here nor beside.
        unsafe {
            let first = std::ptr::without_provenance_mut(from * HUGE_PAGE);
            libc::madvise(first, (to - from) * HUGE_PAGE, libc::MADV_HUGEPAGE);
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (start, len);
}

/// Room for so many rows, which the caller writes.
///
/// # Safety
/// Nobody reads what he has not written.
#[cfg(any(target_arch = "x86_64", test))]
pub(crate) unsafe fn uninit_rows(len: usize) -> Vec<PairRow> {
    // SAFETY: every bit pattern is a row, and the caller's promise.
    let rows: Vec<PairRow> = unsafe { room_of(len) };
    ask_for_huge_pages(rows.as_ptr(), len);
    rows
}

/// Bytes from which a matrix is worth a system call.
#[cfg(target_os = "linux")]
const WORTH_HUGE_PAGES: usize = 128 << 10;

/// The panels of `W [out, in]`, of which `read` writes row `i`. A panel's rows are read into
/// scratch and transposed from there, so nothing else of the matrix's size is held.
fn pack<E, const LINKS: usize, R>(
    out: usize,
    in_: usize,
    read: impl Fn(usize, &mut [E]) + Sync,
) -> Vec<R>
where
    E: Copy + Default + Send + Sync,
    R: PanelRow<E, LINKS>,
{
    assert!(out > 0 && in_ > 0, "weight is not a matrix [out, in]");
    let width = in_.div_ceil(LINKS);
    let zero = [E::default(); LINKS];
    let fill = |scratch: &mut Vec<[E; LINKS]>, (panel, to): (usize, &mut [MaybeUninit<R>])| {
        for (i, row) in (panel * LANES..).zip(scratch.chunks_mut(width)) {
            match i < out {
                true => read(i, &mut row.as_flattened_mut()[..in_]),
                false => row.fill(zero),
            }
        }
        for (i, to) in to.iter_mut().enumerate() {
            to.write(R::new(std::array::from_fn(|lane| scratch[lane * width + i])));
        }
    };
    let len = out.div_ceil(LANES) * width;
    let mut rows = Vec::with_capacity(len);
    ask_for_huge_pages(rows.as_ptr(), len);
    let panels = rows.spare_capacity_mut()[..len].par_chunks_mut(width).enumerate();
    let panels = panels.with_min_len(SMALL.div_ceil(LANES * in_));
    panels.for_each_init(|| vec![zero; LANES * width], fill);
    // SAFETY: every row of every panel was written.
    unsafe { rows.set_len(len) };
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
            let wide: Vec<f32> = w.iter().map(|&x| bf16::from_f32(x).to_f32()).collect();
            prop_assert_eq!(PackedMatrix::from_f32_as_bf16(&w, out, in_).unpack(), wide);
        }

        #[test]
        fn panels_hold_every_weight_at_its_place_and_zeros_elsewhere(
            (out, in_) in prop_oneof![(1usize..40, 1usize..20), (100usize..150, 1500usize..1510)]
        ) {
            let w: Vec<f32> = (1..=out * in_).map(|i| i as f32).collect();
            let at = |(o, i): (usize, usize)| if o < out && i < in_ { w[o * in_ + i] } else { 0.0 };
            let Storage::F32(rows) = PackedMatrix::from_f32(&w, out, in_).storage else { panic!() };
            let mut found = rows.iter().flat_map(|row| row.0).enumerate();
            prop_assert!(found.all(|(k, x)| x == at(place(k, in_, 1))));
            let bf16 = PackedMatrix::from_f32_as_bf16(&w, out, in_);
            let Storage::Bf16(rows) = bf16.storage else { panic!() };
            let mut found = rows.iter().flat_map(|row| row.0).enumerate();
            prop_assert!(found.all(|(k, x)| x == bf16::from_f32(at(place(k, in_, 2))).to_bits()));
        }
    }

    /// Output and input feature of number `k` of panels with `links` input features side by side.
    fn place(k: usize, in_: usize, links: usize) -> (usize, usize) {
        let row = links * LANES;
        let panel = in_.div_ceil(links) * row;
        (k / panel * LANES + k % row / links, k % panel / row * links + k % links)
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
