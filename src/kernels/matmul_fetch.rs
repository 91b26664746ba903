//! Brings the part of a weight closer that the next panels are filled from, while the present ones are
//! multiplied.

use std::ops::Range;

use super::lanes::LANES;
use super::matmul::Axis;
#[cfg(target_arch = "x86_64")]
use super::matmul_rounded::Layout;
#[cfg(target_arch = "x86_64")]
use super::pack::PairRow;
use super::pack::{PackedMatrix, Storage};
use super::prefetch;

/// Bytes of a cache line, and of a row of a panel.
const LINE: usize = 64;

/// Lines of a weight that have not been fetched yet: runs of equal length, `stride` bytes apart.
#[derive(Clone, Copy)]
pub(crate) struct Fetch {
    run: *const u8,
    stride: usize,
    runs: usize,
    run_lines: usize,
    /// Lines of the present run that have been fetched.
    done: usize,
}

impl Fetch {
    /// Nothing to fetch.
    pub(crate) const NONE: Self =
        Self { run: std::ptr::null(), stride: 0, runs: 0, run_lines: 0, done: 0 };

    /// What `panels` are filled from for the links `k`, which begin at a multiple of sixteen, of the weight
    /// seen along `axis`.
    pub(crate) fn new(w: &PackedMatrix, axis: Axis, panels: Range<usize>, k: Range<usize>) -> Self {
        let (start, links) = match &w.storage {
            Storage::F32(rows) => (rows.as_ptr().cast::<u8>(), 1),
            Storage::Bf16(rows) => (rows.as_ptr().cast::<u8>(), 2),
        };
        let panel = w.in_features().div_ceil(links);
        let (first, runs, run_lines) = match axis {
            Axis::Output => {
                (panels.start * panel + k.start / links, panels.len(), k.len().div_ceil(links))
            }
            Axis::Input => {
                let first = k.start / LANES * panel + panels.start * LANES / links;
                (first, k.len().div_ceil(LANES), panels.len() * LANES / links)
            }
        };
        let (run, stride) = (start.wrapping_add(first * LINE), panel * LINE);
        Self { run, stride, runs, run_lines, done: 0 }
    }

    /// The integers of `panels` for the links `k`, a block of them, among `rows`.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn rounded(
        rows: &[PairRow],
        layout: Layout,
        panels: Range<usize>,
        k: Range<usize>,
    ) -> Self {
        let run = rows[layout.place(panels.start, k.start)..].as_ptr().cast();
        let (runs, run_lines) = (panels.len(), k.len().div_ceil(2));
        Self { run, stride: layout.panel * LINE, runs, run_lines, done: 0 }
    }

    /// Lines that are left.
    #[inline(always)]
    pub(crate) fn lines(&self) -> usize {
        (self.runs * self.run_lines).saturating_sub(self.done)
    }

    /// Fetches the next `lines`, or those that are left.
    #[inline(always)]
    pub(crate) fn some(&mut self, lines: usize) {
        for _ in 0..lines.min(self.lines()) {
            prefetch::to_second(self.run.wrapping_add(self.done * LINE));
            self.done += 1;
            if self.done == self.run_lines {
                self.run = self.run.wrapping_add(self.stride);
                (self.runs, self.done) = (self.runs - 1, 0);
            }
        }
    }

    /// Leaves the next `lines` of a run to the caller: their address, from which they may reach past its end, or `None` where all have been fetched.
    #[inline(always)]
    pub(crate) fn take(&mut self, lines: usize) -> Option<*const u8> {
        let place = (self.runs > 0).then(|| self.run.wrapping_add(self.done * LINE));
        self.done += lines;
        if self.done >= self.run_lines {
            self.run = self.run.wrapping_add(self.stride);
            (self.runs, self.done) = (self.runs.saturating_sub(1), 0);
        }
        place
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The lines that are fetched, as rows of the storage.
    fn rows(mut fetch: Fetch, w: &PackedMatrix) -> Vec<usize> {
        let start = match &w.storage {
            Storage::F32(rows) => rows.as_ptr().addr(),
            Storage::Bf16(rows) => rows.as_ptr().addr(),
        };
        let mut all = Vec::new();
        while fetch.lines() > 0 {
            all.push((fetch.run.addr() - start) / LINE + fetch.done);
            fetch.some(1);
        }
        all
    }

    #[test]
    fn what_is_fetched_is_what_panels_are_filled_from() {
        let w = PackedMatrix::from_f32_as_bf16(&[0.0; 64 * 96], 64, 96);
        let along = rows(Fetch::new(&w, Axis::Output, 1..3, 32..64), &w);
        assert_eq!(along, (64..80).chain(112..128).collect::<Vec<_>>());
        let across = rows(Fetch::new(&w, Axis::Input, 2..4, 16..48), &w);
        assert_eq!(across, (64..80).chain(112..128).collect::<Vec<_>>());
        let w = PackedMatrix::from_f32(&[0.0; 64 * 96], 64, 96);
        let across = rows(Fetch::new(&w, Axis::Input, 2..3, 16..32), &w);
        assert_eq!(across, (128..144).collect::<Vec<_>>());
        assert_eq!(Fetch::NONE.lines(), 0);
    }

    #[test]
    fn taken_lines_are_those_that_would_be_fetched() {
        let w = PackedMatrix::from_f32_as_bf16(&[0.0; 64 * 96], 64, 96);
        let Storage::Bf16(stored) = &w.storage else { unreachable!("packed as bf16") };
        let mut fetch = Fetch::new(&w, Axis::Output, 1..3, 32..64);
        let mut next = || {
            let place = fetch.take(12)?;
            Some((place.addr() - stored.as_ptr().addr()) / LINE)
        };
        assert_eq!([next(), next(), next(), next()], [64, 76, 112, 124].map(Some));
        assert_eq!([next(), next()], [None, None]);
        assert_eq!({ Fetch::NONE }.take(12), None);
    }
}
