//! Numbers for tests.

use super::dispatch::CpuLevel;
use super::matmul::{Axis, MatmulPrecision, Output, Terms, Way, product_by};
use super::pack::{PackedMatrix, Storage};

/// All bits of a packed matrix, padding included.
pub(crate) fn packed_bits(w: &PackedMatrix) -> Vec<u32> {
    match &w.storage {
        Storage::F32(rows) => rows.iter().flat_map(|row| row.0.map(f32::to_bits)).collect(),
        Storage::Bf16(rows) => rows.iter().flat_map(|row| row.0.map(u32::from)).collect(),
    }
}

/// `n` numbers in -1..1 that depend on `seed` (SplitMix64).
pub(crate) fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// Either product at a given level.
pub(crate) fn product_at(
    (level, axis): (CpuLevel, Axis),
    x: &[f32],
    w: &PackedMatrix,
    terms: Terms,
    precision: MatmulPrecision,
) -> Vec<f32> {
    let (k, columns) = sides(axis, w);
    let mut y = vec![f32::NAN; x.len() / k * columns];
    let output = Output { w, terms, y: &mut y };
    product_by(Way::of(level, precision), (level, axis), x, vec![output]);
    y
}

/// Either product in a given way where the machine has it, however fast, or nothing (with a visible line).
#[cfg(target_arch = "x86_64")]
pub(crate) fn product_where_there(
    way: Way,
    axis: Axis,
    x: &[f32],
    w: &PackedMatrix,
) -> Option<Vec<f32>> {
    let level = CpuLevel::detect().min(CpuLevel::Avx512);
    if !way.is_there(level) {
        eprintln!("SKIPPED: the machine has no instruction for {way:?}");
        return None;
    }
    let (k, columns) = sides(axis, w);
    let mut y = vec![f32::NAN; x.len() / k * columns];
    let output = Output { w, terms: Terms::default(), y: &mut y };
    product_by(way, (level, axis), x, vec![output]);
    Some(y)
}

/// Inputs and outputs of a product.
pub(crate) fn sides(axis: Axis, w: &PackedMatrix) -> (usize, usize) {
    (axis.links(w), axis.columns(w))
}

/// Largest difference over largest reference.
pub(crate) fn relative_error(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let error = got.iter().zip(want).map(|(g, w)| (f64::from(*g) - w).abs()).fold(0.0, f64::max);
    assert!(got.iter().all(|x| x.is_finite()));
    error / want.iter().fold(1e-30, |m, w| w.abs().max(m))
}

/// Runs `work` on a pool of `threads`.
pub(crate) fn with_threads<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work)
}
