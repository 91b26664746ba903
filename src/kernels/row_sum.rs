//! Sums over the rows of a step, which may come in several calls.

/// Rows of a chain.
pub(super) const CHAIN: usize = 256;

/// A sum over rows: chains over 256 rows at a time, counted from the first row of the first call,
/// their results added in order. Cutting the rows into several calls changes no bit.
#[derive(Clone, Debug)]
pub struct RowSum {
    /// Of the finished chains.
    total: Vec<f32>,
    /// The chain that the next row belongs to, if it has begun.
    open: Vec<f32>,
    rows: usize,
}

impl RowSum {
    /// A sum of no rows, `len` numbers.
    pub fn new(len: usize) -> Self {
        Self { total: vec![0.0; len], open: Vec::new(), rows: 0 }
    }

    /// How many numbers it has.
    pub fn len(&self) -> usize {
        self.total.len()
    }

    /// Whether it has no number.
    pub fn is_empty(&self) -> bool {
        self.total.is_empty()
    }

    /// Rows added so far.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The sum.
    pub fn finish(mut self) -> Vec<f32> {
        let open = std::mem::take(&mut self.open);
        self.add(&open);
        self.total
    }

    /// Rows that still fit into the chain at hand.
    pub(super) fn room(&self) -> usize {
        CHAIN - self.rows % CHAIN
    }

    /// Room for the chains that `rows` more rows take part in, `[chains, len]`; the first goes on
    /// where the last call ended.
    pub(super) fn begin(&mut self, rows: usize) -> Vec<f32> {
        let chains = 1 + rows.saturating_sub(self.room()).div_ceil(CHAIN);
        let mut parts = vec![0.0; chains * self.len()];
        parts[..self.open.len()].copy_from_slice(&self.open);
        self.open.clear();
        parts
    }

    /// Takes in the chains of [`RowSum::begin`] after `rows` rows were added to them.
    pub(super) fn end(&mut self, parts: &[f32], rows: usize) {
        self.rows += rows;
        let begun = if self.rows.is_multiple_of(CHAIN) { 0 } else { self.len() };
        let (finished, open) = parts.split_at(parts.len() - begun);
        for part in finished.chunks_exact(self.len().max(1)) {
            self.add(part);
        }
        self.open = open.to_vec();
    }

    fn add(&mut self, part: &[f32]) {
        self.total.iter_mut().zip(part).for_each(|(total, part)| *total += part);
    }
}

/// The parts of rows `xs [M, width]` that belong to each chain, `room` rows to the first.
pub(super) fn by_chain(xs: &[f32], room: usize, width: usize) -> impl Iterator<Item = &[f32]> {
    let (first, rest) = xs.split_at((room * width).min(xs.len()));
    std::iter::once(first).chain(rest.chunks(CHAIN * width))
}

/// [`by_chain`] of rows that are written.
pub(super) fn by_chain_mut(
    xs: &mut [f32],
    room: usize,
    width: usize,
) -> impl Iterator<Item = &mut [f32]> {
    let (first, rest) = xs.split_at_mut((room * width).min(xs.len()));
    std::iter::once(first).chain(rest.chunks_mut(CHAIN * width))
}

/// Adds the sum over the rows of `x [M, W]` to `sum`, of `W` numbers.
pub fn add_rows(x: &[f32], sum: &mut RowSum) {
    let (width, room) = (sum.len(), sum.room());
    let rows = x.len() / width.max(1);
    assert!(x.len() == rows * width, "rows are not [M, {width}]");
    let mut parts = sum.begin(rows);
    for (x, part) in by_chain(x, room, width).zip(parts.chunks_exact_mut(width.max(1))) {
        for row in x.chunks_exact(width.max(1)) {
            part.iter_mut().zip(row).for_each(|(part, x)| *part += x);
        }
    }
    sum.end(&parts, rows);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::noise;

    #[test]
    fn cutting_the_rows_changes_no_bit() {
        let (rows, width) = (900, 5);
        let x = noise(1, rows * width);
        let mut whole = RowSum::new(width);
        add_rows(&x, &mut whole);
        let whole = whole.finish();
        for cuts in [vec![0, 256, 900], vec![1, 255, 257, 300, 899], vec![512, 512, 768]] {
            let mut sum = RowSum::new(width);
            let mut from = 0;
            for to in cuts.into_iter().chain([rows]) {
                add_rows(&x[from * width..to * width], &mut sum);
                from = to;
            }
            assert_eq!((sum.rows(), sum.finish()), (rows, whole.clone()));
        }
        for (i, sum) in whole.iter().enumerate() {
            let exact: f64 = x[i..].iter().step_by(width).map(|x| f64::from(*x)).sum();
            assert!((f64::from(*sum) - exact).abs() < 1e-4, "{sum} {exact}");
        }
    }
}
