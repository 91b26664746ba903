//! The head of candle's own operations: the oracle in tests, and the path on devices without its kernels.

use candle_core::{D, DType, Tensor};

use super::engine::composed;
use super::head::{Distribution, Head, Logps, Pull, Rows, capped, compact};
use super::linear::linear;
use super::tape::Tape;
use super::value::Value;
use crate::Result;
use crate::kernels::logp::{RowRule, Target};

impl Head<'_> {
    /// [`Head::weighted_logps`] of candle's operations.
    pub(super) fn composed_weighted(
        &self,
        tape: &Tape,
        h: &Value,
        pull: Pull,
        distribution: Distribution,
    ) -> Result<(Value, Logps)> {
        let Rows { rows, targets } = compact(pull.targets, usize::MAX).next().unwrap_or_default();
        let z = linear(tape, &self.normed(tape, h, &rows)?, self.weight)?;
        let (logps, said) = self.composed_logps(tape, &z, &targets, distribution)?;
        let device = tape.engine().device();
        let weights = Tensor::new(pull.weights, device)?;
        let sum = composed(tape, &[&logps], |xs| (&xs[0] * &weights)?.sum_all()?.reshape(1))?;
        let Some(dentropy) = pull.dentropy else { return Ok((sum, said)) };
        let dentropy = Tensor::new(dentropy, device)?;
        let masks = Masks::new(&z, distribution)?;
        let bonus = composed(tape, &[&z], |xs| {
            let all = log_softmax(&masks.apply(capped(xs[0].clone(), self.softcap32())?)?)?;
            (entropies(&all)? * &dentropy)?.sum_all()?.reshape(1)
        })?;
        let sum = composed(tape, &[&sum, &bonus], |xs| &xs[0] + &xs[1])?;
        Ok((sum, said))
    }

    fn softcap32(&self) -> Option<f32> {
        self.softcap.map(|cap| cap as f32)
    }

    /// log p(target) of each target under the distributions of logits z [rows, V].
    pub(super) fn composed_logps(
        &self,
        tape: &Tape,
        z: &Value,
        targets: &[Target],
        distribution: Distribution,
    ) -> Result<(Value, Logps)> {
        let device = tape.engine().device();
        let masks = Masks::new(z, distribution)?;
        let rows = Tensor::new(targets.iter().map(|t| t.row).collect::<Vec<_>>(), device)?;
        let tokens = Tensor::new(targets.iter().map(|t| t.token).collect::<Vec<_>>(), device)?;
        let all = |z: &Tensor| log_softmax(&masks.apply(capped(z.clone(), self.softcap32())?)?);
        let logps = composed(tape, &[z], |xs| {
            let picked = all(&xs[0])?.index_select(&rows, 0)?;
            picked.gather(&tokens.unsqueeze(1)?, 1)?.squeeze(1)
        })?;
        let all = all(z.tensor())?;
        let said = Logps {
            logps: logps.tensor().to_vec1()?,
            entropy: entropies(&all)?.to_vec1()?,
            argmax: all.argmax(D::Minus1)?.to_dtype(DType::U32)?.to_vec1()?,
            mass: Vec::new(),
        };
        Ok((logps, said))
    }
}

/// A [`Distribution`] as tensors, for candle's operations.
struct Masks {
    inv_temperature: f64,
    penalty: f64,
    /// 1 where the penalty applies, 0 elsewhere [rows, V].
    penalised: Option<Tensor>,
    /// 0 at kept tokens, far below every logit elsewhere [rows, V].
    left_out: Option<Tensor>,
}

/// Where a token cannot be drawn: its probability is 0, and 0 times its log is 0.
const LEFT_OUT: f32 = -1e30;

impl Masks {
    fn new(z: &Value, distribution: Distribution) -> Result<Self> {
        let (rows, vocabulary) = z.tensor().dims2()?;
        let filled = |fill: &dyn Fn(&RowRule, &mut [f32])| -> Result<Option<Tensor>> {
            if distribution.rules.is_empty() {
                return Ok(None);
            }
            let mut values = vec![0f32; rows * vocabulary];
            let of_rows = values.chunks_exact_mut(vocabulary).zip(distribution.rules);
            of_rows.for_each(|(row, rule)| fill(rule, row));
            Ok(Some(Tensor::from_vec(values, (rows, vocabulary), z.tensor().device())?))
        };
        Ok(Masks {
            inv_temperature: 1.0 / distribution.temperature,
            penalty: distribution.repetition_penalty,
            penalised: filled(&|rule, row| {
                rule.penalised.iter().for_each(|token| row[*token as usize] = 1.0)
            })?,
            left_out: filled(&|rule, row| {
                if !rule.kept.is_empty() {
                    row.fill(LEFT_OUT);
                    rule.kept.iter().for_each(|token| row[*token as usize] = 0.0);
                }
            })?,
        })
    }

    fn apply(&self, mut z: Tensor) -> candle_core::Result<Tensor> {
        if let Some(penalised) = &self.penalised {
            let negative = z.lt(0f64)?.to_dtype(DType::F32)?;
            // z (1 + penalised (factor - 1)), the factor by the sign of z
            let factor = negative.affine(self.penalty - 1.0 / self.penalty, 1.0 / self.penalty)?;
            z = (&z + (&z * (penalised * (factor - 1.0)?)?)?)?;
        }
        z = (z * self.inv_temperature)?;
        match &self.left_out {
            None => Ok(z),
            Some(left_out) => z + left_out,
        }
    }
}

/// Entropy in nats of each row of log-probs.
fn entropies(all: &Tensor) -> candle_core::Result<Tensor> {
    (all.exp()? * all)?.sum(D::Minus1)?.neg()
}

fn log_softmax(z: &Tensor) -> candle_core::Result<Tensor> {
    let shifted = z.broadcast_sub(&z.max_keepdim(D::Minus1)?.detach())?;
    shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(D::Minus1)?.log()?)
}
