//! Gradients of parameters while they are summed, over the layers of a pass and over passes.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::Engine;
use crate::Result;
use crate::kernels::row_sum::RowSum;

/// Gradients by parameter key, each of its parameter's shape.
pub type Gradients = BTreeMap<String, Tensor>;

/// Gradients of a step that may be computed in several passes.
///
/// Those of low-rank and vector parameters are sums over rows that go on from pass to pass: as long
/// as the passes take the rows in order, where they are cut changes no bit.
#[derive(Default)]
pub struct GradientSums {
    whole: Gradients,
    rows: BTreeMap<String, Rows>,
}

/// A gradient that is a sum over rows.
struct Rows {
    sum: RowSum,
    layout: Layout,
}

/// How the numbers of a [`RowSum`] make up a gradient.
#[derive(Clone, Copy)]
pub(super) enum Layout {
    /// A vector.
    Vector,
    /// A matrix of so many rows.
    Matrix(usize),
    /// The transpose of a matrix, whose own rows are so many.
    Transposed(usize),
}

impl Layout {
    pub(super) fn tensor(self, engine: &Engine, sum: RowSum) -> Result<Tensor> {
        let len = sum.len();
        let values = sum.finish();
        match self {
            Layout::Vector => engine.tensor(values, &[len]),
            Layout::Matrix(rows) => engine.tensor(values, &[rows, len / rows]),
            Layout::Transposed(rows) => {
                Ok(engine.tensor(values, &[rows, len / rows])?.t()?.contiguous()?)
            }
        }
    }
}

impl GradientSums {
    /// No gradient yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds `gradient` to that of the parameter `key`.
    pub(super) fn add(&mut self, engine: &Engine, key: &str, gradient: Tensor) -> Result<()> {
        let sum = match self.whole.get(key) {
            None => gradient,
            Some(before) => engine.add(before, &gradient)?,
        };
        self.whole.insert(key.to_string(), sum);
        Ok(())
    }

    /// Takes out the running sum over rows of the parameter `key`, of `len` numbers.
    pub(super) fn take(&mut self, key: &str, len: usize) -> RowSum {
        self.rows.remove(key).map_or_else(|| RowSum::new(len), |rows| rows.sum)
    }

    /// Puts back what [`GradientSums::take`] took out.
    pub(super) fn put(&mut self, key: &str, sum: RowSum, layout: Layout) {
        self.rows.insert(key.to_string(), Rows { sum, layout });
    }

    /// The gradients.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub fn finish(mut self, engine: &Engine) -> Result<Gradients> {
        for (key, Rows { sum, layout }) in std::mem::take(&mut self.rows) {
            let gradient = layout.tensor(engine, sum)?;
            self.add(engine, &key, gradient)?;
        }
        Ok(self.whole)
    }
}
