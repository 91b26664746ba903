//! Keys and values in the numbers that their cache holds.

use candle_core::Tensor;
use tracing::trace_span;

use super::engine::{Engine, host};
use super::tape::{Sink, Tape};
use super::value::Value;
use crate::Result;
use crate::kernels::pages::PageDtype;
use crate::kernels::slices::rounded_to_bf16;

/// Keys or values x [N, kv_heads * head_dim] as the cache holds them, so that attention over a cache and
/// over a whole sequence reads the same numbers: rounded to the nearest bf16 at `medium` on the CPU, else x
/// itself.
/// Gradients pass as if nothing were rounded.
pub fn as_cached(tape: &Tape, x: &Value) -> Result<Value> {
    if tape.engine().kv_dtype() == PageDtype::F32 {
        return Ok(x.clone());
    }
    let _span = trace_span!("round", bytes = 8 * x.tensor().elem_count()).entered();
    let y = rounded(tape.engine(), x.tensor())?;
    let pullback = || |dy: Tensor, sink: &mut Sink| sink.give(0, dy);
    if !x.is_cheap() {
        return Ok(tape.push(y, &[x], pullback));
    }
    Ok(tape.push_cheap(y, &[x], || {
        let (x, engine) = (x.keep(), tape.engine().clone());
        (pullback(), move || rounded(&engine, &x.tensor()?))
    }))
}

fn rounded(engine: &Engine, x: &Tensor) -> Result<Tensor> {
    engine.tensor(rounded_to_bf16(&host(x)?), x.dims())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::matmul::MatmulPrecision;
    use crate::kernels::testing::noise;
    use candle_core::{DType, Device};

    #[test]
    fn rounding_is_of_medium_on_the_cpu_alone_and_lets_gradients_through() {
        for precision in [MatmulPrecision::Highest, MatmulPrecision::High, MatmulPrecision::Medium]
        {
            let x = Tensor::from_vec(noise(1, 40), (5, 8), &Device::Cpu).unwrap();
            let dy = Tensor::from_vec(noise(7, 40), (5, 8), &Device::Cpu).unwrap();
            let nearest = x.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
            let numbers = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for (engine, fused) in [(Engine::cpu(), true), (Engine::cpu().composed(), false)] {
                let rounds = fused && precision == MatmulPrecision::Medium;
                let want = if rounds { &nearest } else { &x };
                let tape = Tape::recording(&engine.with_precision(precision));
                let y = as_cached(&tape, &tape.param("x", &x)).unwrap();
                assert_eq!(numbers(y.tensor()), numbers(want));
                let gradients = tape.backward(&y, dy.clone()).unwrap();
                assert_eq!(numbers(&gradients["x"]), numbers(&dy));
            }
            assert_ne!(numbers(&nearest), numbers(&x));
        }
    }
}
