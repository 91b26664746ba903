//! The low-rank updates of a frozen matrix: LoRA, whose A is Wdown and whose B is Wup.

use std::rc::Rc;

use candle_core::Tensor;
use tracing::trace_span;

use super::engine::{Host, host};
use super::low_rank::{LowRank, give_matrices};
use super::tape::Sink;
use super::value::{Kept, Value};
use crate::Result;
use crate::kernels::low_rank::{self, Down, InputGradient};
use crate::kernels::low_rank_term::LowRankTerm;
use crate::kernels::slices::room;

/// What is added to the product of a matrix: alpha * phi(x Wdownᵀ) Wupᵀ.
#[derive(Clone, Debug)]
pub struct LowRankUpdate {
    /// Its x [N, in], if that is not the matrix's input itself but, say, what dropout left of it.
    pub input: Option<Value>,
    /// Wdown [R, in].
    pub down: Value,
    /// Wup [out, R].
    pub up: Value,
    /// The rest of the formula.
    pub form: LowRank,
}

impl LowRankUpdate {
    /// Its x, given the matrix's input.
    pub(super) fn input<'a>(&'a self, x: &'a Value) -> &'a Value {
        self.input.as_ref().unwrap_or(x)
    }

    /// Its inputs among those of the operation.
    pub(super) fn inputs<'a>(&'a self, x: &'a Value) -> [&'a Value; 3] {
        [self.input(x), &self.down, &self.up]
    }

    /// What it adds, given its code and the numbers of Wup.
    pub(super) fn term<'a>(&self, code: &[f32], wup: &'a [f32]) -> Result<LowRankTerm<'a>> {
        let (r, LowRank { alpha, activation }) = (self.up.tensor().dims2()?.1, self.form);
        Ok(LowRankTerm::of_output((code, r), wup, (alpha, activation)))
    }

    /// What the backward pass needs, given its code.
    pub(super) fn keep(&self, x: &Value, code: Rc<[f32]>) -> KeptUpdate {
        let (down, up) = (self.down.tensor().clone(), self.up.tensor().clone());
        let own_input = self.input.is_some();
        KeptUpdate { x: self.input(x).keep(), own_input, code, down, up, form: self.form }
    }
}

/// The codes before the activation, x Wdownᵀ [N, R], of the updates of some matrices with the same
/// input x [N, in].
pub(super) fn codes(x: &Tensor, updates: &[&[LowRankUpdate]]) -> Result<Vec<Vec<Rc<[f32]>>>> {
    let all: Vec<&LowRankUpdate> = updates.iter().copied().flatten().collect();
    if all.is_empty() {
        return Ok(vec![Vec::new(); updates.len()]);
    }
    let (m, d) = x.dims2()?;
    let ranks = all.iter().map(|update| Ok(update.down.tensor().dims2()?.0));
    let ranks = ranks.collect::<Result<Vec<_>>>()?;
    let r: usize = ranks.iter().sum();
    let _span = trace_span!("low rank", flops = 2 * m * r * d, bytes = 4 * m * (d + r)).entered();
    let downs = all.iter().map(|update| host(update.down.tensor())).collect::<Result<Vec<_>>>()?;
    let mut codes: Vec<Vec<f32>> = ranks.iter().map(|r| room(m * r)).collect();
    let mut together = Vec::new();
    for ((update, wdown), z) in all.iter().zip(&downs).zip(&mut codes) {
        let down = Down { wdown, z };
        match &update.input {
            None => together.push(down),
            Some(own) => low_rank::down_all(&host(own.tensor())?, d, vec![down]),
        }
    }
    low_rank::down_all(&host(x)?, d, together);
    let mut codes = codes.into_iter().map(Rc::from);
    Ok(updates.iter().map(|updates| codes.by_ref().take(updates.len()).collect()).collect())
}

/// What the backward pass keeps of an update.
pub(super) struct KeptUpdate {
    x: Kept,
    /// Whether `x` is an input of its own.
    own_input: bool,
    code: Rc<[f32]>,
    down: Tensor,
    up: Tensor,
    form: LowRank,
}

impl KeptUpdate {
    /// Gives the gradients of the update's own input, of Wdown and of Wup, inputs `first` to `first + 2` of
    /// the operation. Returns the gradient of the code, if Wdown is applied to the matrix's input.
    pub(super) fn backward(
        &self,
        dy: &Tensor,
        first: usize,
        sink: &mut Sink,
    ) -> Result<Option<Vec<f32>>> {
        let x = self.x.tensor()?;
        let ((m, d), (o, r)) = (x.dims2()?, self.up.dims2()?);
        let own = self.own_input && sink.wants(first);
        let sums = 2 * m * r * (d + 2 * o) + if own { 2 * m * r * d } else { 0 };
        let _span = trace_span!("low rank backward", flops = sums).entered();
        let rows = host(&x)?;
        let saved = (&*rows, &*self.code, &self.down, &self.up, self.form);
        if own {
            let mut dx = vec![0.0; m * d];
            give_matrices(saved, dy, InputGradient::Add(&mut dx), first + 1, sink)?;
            sink.give_own(first, dx, &(m, d).into())?;
            return Ok(None);
        }
        let mut dz = room(self.code.len());
        give_matrices(saved, dy, InputGradient::Code(&mut dz), first + 1, sink)?;
        Ok((!self.own_input).then_some(dz))
    }

    /// R and the numbers of Wdown [R, in].
    pub(super) fn down(&self) -> Result<(usize, Host<'_>)> {
        Ok((self.down.dims2()?.0, host(&self.down)?))
    }
}
