//! Frozen linear maps: y = x Wᵀ + b with the low-rank updates of W, and the gradients of x and of the
//! updates.

use std::rc::Rc;

use candle_core::Tensor;
use tracing::trace_span;

use super::engine::{Engine, Host, host};
use super::low_rank::composed_add;
use super::low_rank_update::{KeptUpdate, LowRankUpdate, codes};
use super::tape::{Sink, Tape};
use super::value::Value;
use super::weight::Weight;
use crate::kernels::low_rank_term::LowRankTerm;
use crate::kernels::matmul::{Output, Terms, matmul_all};
use crate::kernels::slices::room;
use crate::{Error, Result};

/// A frozen linear map and what adapters add to it.
#[derive(Clone, Debug)]
pub struct Linear<'a> {
    /// W [out, in].
    pub weight: &'a Weight,
    /// b `[out]`.
    pub bias: Option<&'a Tensor>,
    /// The low-rank updates of W.
    pub updates: Vec<LowRankUpdate>,
}

impl Linear<'_> {
    /// FLOPs of its product with `rows` rows and the terms of its updates.
    fn flops(&self, rows: usize, terms: &[LowRankTerm]) -> usize {
        self.weight.flops(rows) + terms.iter().map(LowRankTerm::flops).sum::<usize>()
    }

    /// Bytes that its product reads and writes at least, the input left out.
    fn bytes(&self, rows: usize) -> usize {
        self.weight.bytes() + 4 * rows * self.weight.out_features()
    }
}

/// y = x Wᵀ for x [N, in].
pub fn linear(tape: &Tape, x: &Value, weight: &Weight) -> Result<Value> {
    let [y] = linears(tape, x, [Linear { weight, bias: None, updates: Vec::new() }])?;
    Ok(y)
}

/// Several linear maps of the same x [N, in].
///
/// On the CPU they are computed together, and the updates are added to each block of y, and to that
/// of the gradient of x, while it is in cache.
pub fn linears<const N: usize>(tape: &Tape, x: &Value, maps: [Linear; N]) -> Result<[Value; N]> {
    linears_known(tape, x, maps, [None; N])
}

/// [`linears`] of which only the gradient's way is wanted where a result is known, or nobody reads it: what is
/// in `known`, [N, out], takes its place, so that fused products are spared.
pub fn linears_known<const N: usize>(
    tape: &Tape,
    x: &Value,
    maps: [Linear; N],
    known: [Option<&Tensor>; N],
) -> Result<[Value; N]> {
    let results = match tape.engine().fused() {
        true => fused(tape, x, &maps, &known)?,
        false => maps.iter().map(|map| composed(tape, x, map)).collect::<Result<_>>()?,
    };
    results.try_into().map_err(|_| Error::failure("a linear map has no result"))
}

fn composed(tape: &Tape, x: &Value, map: &Linear) -> Result<Value> {
    let y = map.weight.apply(tape.engine(), x.tensor(), map.bias)?;
    let y = tape.push(y, &[x], || {
        let (weight, engine) = (map.weight.clone(), tape.engine().clone());
        move |dy: Tensor, sink: &mut Sink| weight.give_input_gradient(&engine, &dy, &[], sink)
    });
    map.updates.iter().try_fold(y, |y, update| {
        composed_add(tape, &y, update.input(x), (&update.down, &update.up), update.form)
    })
}

fn fused(tape: &Tape, x: &Value, maps: &[Linear], known: &[Option<&Tensor>]) -> Result<Vec<Value>> {
    let updates: Vec<_> = maps.iter().map(|map| &map.updates[..]).collect();
    let codes = codes(x.tensor(), &updates)?;
    let unknown = maps.iter().zip(&codes).zip(known).filter(|(_, known)| known.is_none());
    let (wanted, of_wanted): (Vec<_>, Vec<_>) = unknown.map(|(pair, _)| pair).unzip();
    let mut ys = products(tape.engine(), x.tensor(), &wanted, &of_wanted)?.into_iter();
    let ys = known.iter().filter_map(|known| known.cloned().or_else(|| ys.next()));
    let results = maps.iter().zip(ys.collect::<Vec<_>>().into_iter().zip(codes));
    Ok(results.map(|(map, result)| record(tape, x, map, result)).collect())
}

/// The result of a map, which has these codes.
fn record(tape: &Tape, x: &Value, map: &Linear, (y, codes): (Tensor, Vec<Rc<[f32]>>)) -> Value {
    let of_updates = map.updates.iter().flat_map(|update| update.inputs(x));
    let inputs: Vec<&Value> = std::iter::once(x).chain(of_updates).collect();
    tape.push(y, &inputs, || {
        let kept = map.updates.iter().zip(codes).map(|(update, code)| update.keep(x, code));
        let (kept, weight) = (kept.collect::<Vec<_>>(), map.weight.clone());
        let engine = tape.engine().clone();
        move |dy: Tensor, sink: &mut Sink| backward(&engine, (&weight, &kept), &dy, sink)
    })
}

/// Gives the gradients of the updates and of x.
fn backward(
    engine: &Engine,
    (weight, updates): (&Weight, &[KeptUpdate]),
    dy: &Tensor,
    sink: &mut Sink,
) -> Result<()> {
    let of_update = |(i, update): (usize, &KeptUpdate)| update.backward(dy, 1 + 3 * i, sink);
    let codes = updates.iter().enumerate().map(of_update).collect::<Result<Vec<_>>>()?;
    let downs = updates.iter().map(KeptUpdate::down).collect::<Result<Vec<_>>>()?;
    let terms = codes.into_iter().zip(&downs);
    let terms = terms.filter_map(|(dz, (r, down))| Some(LowRankTerm::of_input((dz?, *r), down)));
    let terms: Vec<_> = terms.collect();
    weight.give_input_gradient(engine, dy, &terms, sink)
}

/// The results of maps whose updates have these codes.
fn products(
    engine: &Engine,
    x: &Tensor,
    maps: &[&Linear],
    codes: &[&Vec<Rc<[f32]>>],
) -> Result<Vec<Tensor>> {
    if maps.is_empty() {
        return Ok(Vec::new());
    }
    let (rows, inputs) = x.dims2()?;
    let ups = maps.iter().map(|map| ups(map)).collect::<Result<Vec<_>>>()?;
    let terms = maps.iter().zip(&ups).zip(codes);
    let terms = terms.map(|((map, ups), codes)| low_rank_terms(map, ups, codes));
    let terms = terms.collect::<Result<Vec<_>>>()?;
    let _span = trace_span!(
        "linear",
        rows,
        width = maps.iter().map(|map| map.weight.out_features()).sum::<usize>(),
        flops = maps.iter().zip(&terms).map(|(map, terms)| map.flops(rows, terms)).sum::<usize>(),
        bytes = 4 * rows * inputs + maps.iter().map(|map| map.bytes(rows)).sum::<usize>(),
    )
    .entered();
    let biases =
        maps.iter().map(|map| map.bias.map(host).transpose()).collect::<Result<Vec<_>>>()?;
    let mut ys: Vec<Vec<f32>> =
        maps.iter().map(|map| room(rows * map.weight.out_features())).collect();
    let outputs = maps.iter().zip(&mut ys).zip(biases.iter().zip(&terms));
    let outputs = outputs.map(|((map, y), (bias, low_rank))| {
        let (w, terms) = (map.weight.packed_here()?, Terms { bias: bias.as_deref(), low_rank });
        Ok(Output { w, terms, y })
    });
    matmul_all(&host(x)?, outputs.collect::<Result<_>>()?, engine.precision());
    let tensor = |(map, y): (&&Linear, _)| engine.tensor(y, &[rows, map.weight.out_features()]);
    maps.iter().zip(ys).map(tensor).collect()
}

/// The numbers of each update's Wup.
fn ups<'a>(map: &'a Linear) -> Result<Vec<Host<'a>>> {
    map.updates.iter().map(|update| host(update.up.tensor())).collect()
}

/// What each update adds, given the numbers of its Wup and its code.
fn low_rank_terms<'a>(
    map: &Linear,
    ups: &'a [Host],
    codes: &[Rc<[f32]>],
) -> Result<Vec<LowRankTerm<'a>>> {
    let terms = map.updates.iter().zip(ups).zip(codes);
    terms.map(|((update, up), code)| update.term(code, up)).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use candle_core::Device;
    use half::bf16;

    use super::super::{LowRank, MatrixRows, WeightDtype, add};
    use super::*;
    use crate::kernels::low_rank::Activation;
    use crate::kernels::testing::noise;

    const N: usize = 70;
    const IN: usize = 20;
    const OUT: usize = 36;
    const R: usize = 3;

    struct Noise(u64);

    impl MatrixRows for Noise {
        fn dims(&self) -> (usize, usize) {
            (OUT, IN)
        }

        fn read_f32(&self, i: usize, into: &mut [f32]) {
            into.copy_from_slice(&noise(self.0 + i as u64, IN));
        }

        fn read_bf16(&self, _: usize, _: &mut [bf16]) {
            unreachable!("the test stores f32");
        }
    }

    fn tensor(seed: u64, rows: usize, columns: usize) -> Tensor {
        Tensor::from_vec(noise(seed, rows * columns), (rows, columns), &Device::Cpu).unwrap()
    }

    /// An update whose parameters are named by `at`; with its own input or not.
    fn update(tape: &Tape, at: u64, own: bool, activation: Activation) -> LowRankUpdate {
        let param = |name: &str, seed, rows, columns| {
            tape.param(&format!("{at}.{name}"), &tensor(10 * at + seed, rows, columns))
        };
        LowRankUpdate {
            input: own.then(|| param("input", 1, N, IN)),
            down: param("down", 2, R, IN),
            up: param("up", 3, OUT, R),
            form: LowRank { alpha: 0.7, activation },
        }
    }

    /// The sum of two maps, the second with a bias, and all gradients.
    fn run(engine: &Engine, tracked: bool, own: bool) -> (Tensor, BTreeMap<String, Tensor>) {
        let tape = Tape::recording(engine);
        let x = match tracked {
            true => tape.param("x", &tensor(1, N, IN)),
            false => Value::constant(tensor(1, N, IN)),
        };
        let weights = [Noise(100), Noise(200)]
            .map(|rows| Weight::new(&Engine::cpu(), &rows, WeightDtype::F32).unwrap());
        let bias = tensor(2, 1, OUT).flatten_all().unwrap();
        let first = vec![update(&tape, 1, own, Activation::Silu)];
        let (linear, tanh) = (Activation::Linear, Activation::Tanh);
        let second = vec![update(&tape, 2, false, linear), update(&tape, 3, own, tanh)];
        let [weight, other] = &weights;
        let maps = [
            Linear { weight, bias: None, updates: first },
            Linear { weight: other, bias: Some(&bias), updates: second },
        ];
        let [a, b] = linears(&tape, &x, maps).unwrap();
        let y = add(&tape, &a, &b).unwrap();
        let gradients = tape.backward(&y, tensor(3, N, OUT)).unwrap();
        (y.tensor().clone(), gradients)
    }

    fn difference(a: &Tensor, b: &Tensor) -> f32 {
        let all = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let (a, b) = (all(a), all(b));
        assert_eq!(a.len(), b.len());
        let largest = b.iter().fold(0f32, |top, x| top.max(x.abs()));
        a.iter().zip(&b).fold(0f32, |top, (a, b)| top.max((a - b).abs())) / largest
    }

    #[test]
    fn maps_with_updates_have_the_results_and_gradients_of_tensor_operations() {
        for (tracked, own) in [(true, false), (true, true), (false, false), (false, true)] {
            let (y, gradients) = run(&Engine::cpu(), tracked, own);
            let (want, wanted) = run(&Engine::cpu().composed(), tracked, own);
            assert!(difference(&y, &want) < 1e-6);
            assert!(gradients.keys().eq(wanted.keys()));
            assert_eq!(gradients.len(), 6 + usize::from(tracked) + 2 * usize::from(own));
            for (name, gradient) in &gradients {
                assert!(difference(gradient, &wanted[name]) < 2e-6, "{name}");
            }
        }
    }

    #[test]
    fn a_matrix_stored_for_another_engine_is_an_error() {
        let weight = Weight::new(&Engine::cpu().composed(), &Noise(1), WeightDtype::F32).unwrap();
        let x = Value::constant(tensor(1, N, IN));
        let error = linear(&Tape::off(&Engine::cpu()), &x, &weight).unwrap_err();
        assert!(error.to_string().contains("another engine"), "{error}");
    }
}
