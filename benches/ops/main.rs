//! Every kernel on SmolLM2-135M's shapes, its rate beside the machine's peak, measured in the same run.
//!
//! `cargo bench --bench ops -- [--quick] [FILTER]`, say `matmul/576x1536/bf16` or `attention`
//!
//! `--quick` takes fewer rows and samples: about two minutes instead of twenty. Times are those of the
//! threads of the pool (`RAYON_NUM_THREADS`). Operands that fit in the caches exceed the bandwidth of
//! the memory.

mod attention;
mod elementwise;
mod head;
mod matmul;
mod peak;
mod rate;

use std::time::Duration;

use criterion::{Criterion, SamplingMode, Throughput};
use rate::Rate;

/// Hidden size, feed-forward size and vocabulary.
const D: usize = 576;
const F: usize = 1536;
const V: usize = 49_152;

/// One `Criterion` for each peak that rates are compared with.
struct Benches {
    quick: bool,
    /// Products in f32.
    flops: Criterion<Rate>,
    /// Products at `medium`.
    medium_flops: Criterion<Rate>,
    /// Bytes from and to memory.
    bytes: Criterion<Rate>,
}

#[global_allocator]
static HEAP: steersman::heap::Heap = steersman::heap::Heap;

fn main() {
    steersman::cli::start_up().expect("threads start");
    let peak = peak::measure();
    println!(
        "peak of {} threads: {:.0} GFLOP/s in f32, {:.0} in medium; memory {:.1} GB/s\n",
        rayon::current_num_threads(),
        peak.gflops,
        peak.medium_gflops,
        peak.gbytes
    );
    let criterion = |unit, peak| {
        let criterion = Criterion::default().with_measurement(Rate::new(unit, peak));
        let criterion = criterion.sample_size(10).warm_up_time(Duration::from_millis(200));
        criterion.measurement_time(Duration::from_secs(1)).configure_from_args()
    };
    let mut benches = Benches {
        quick: std::env::args().any(|arg| arg == "--quick"),
        flops: criterion("GFLOP/s", peak.gflops),
        medium_flops: criterion("GFLOP/s", peak.medium_gflops),
        bytes: criterion("GB/s", peak.gbytes),
    };
    matmul::bench(&mut benches);
    head::bench(&mut benches);
    attention::bench(&mut benches);
    elementwise::bench(&mut benches);
}

/// Measures `work`, which comes to `amount` FLOPs or bytes; `name` is `kernel/case`.
fn measure(criterion: &mut Criterion<Rate>, name: &str, amount: usize, mut work: impl FnMut()) {
    let (kernel, case) = name.split_once('/').unwrap_or((name, "all"));
    let mut group = criterion.benchmark_group(kernel);
    group.sampling_mode(SamplingMode::Flat).throughput(Throughput::Elements(amount as u64));
    group.bench_function(case, |bencher| bencher.iter(&mut work));
    group.finish();
}

/// `n` numbers in -1..1.
fn noise(n: usize) -> Vec<f32> {
    let mut state = 1u64;
    let mut next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}
