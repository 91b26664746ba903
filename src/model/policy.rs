//! The policy: a frozen decoder that adapters hook into.

use std::borrow::Cow;

use candle_core::{DType, Tensor};
use tracing::debug_span;

use super::batch::Batch;
use super::block::{Block, Cached, Pass};
use super::config::ModelConfig;
use super::hooks::Hooks;
use super::recording::{Recorded, Recording};
use super::trace::{Trace, lowest};
use super::weights::Weights;
use crate::ops::{
    self, Attended, Distribution, Engine, Head, KvCache, MatmulPrecision, Pull, Rotary, SlotId,
    Tape, Target,
};
use crate::ops::{Rounded, RowStats, TransposedHead, Value, Weight, WeightDtype};
use crate::{Result, free_memory};

/// Tokens that go through the blocks at once: enough for products at full speed on the threads that
/// there are, and few enough for what a block needs besides its input and output to be small.
pub fn part_tokens() -> usize {
    (512 * rayon::current_num_threads()).clamp(1024, 8192)
}

/// Sees a layer's output, before what adapters add to it, and what attention made there if the pass keeps that.
type See<'a> = dyn FnMut(usize, &Tensor, Option<&Attended>) -> Result<()> + 'a;

/// A decoder-only language model of any supported family, all its weights frozen. A clone shares them.
#[derive(Clone)]
pub struct Policy {
    config: ModelConfig,
    engine: Engine,
    embedding: Weight,
    head: Option<Weight>,
    norm: Tensor,
    inv_freqs: Vec<(Vec<f32>, f32)>,
    pub(super) blocks: Vec<Block>,
}

impl Policy {
    /// Loads the weights that `config` describes; matrices are stored as `dtype`.
    ///
    /// # Errors
    /// If a tensor is missing, damaged or of another shape.
    pub fn load(
        config: &ModelConfig,
        weights: &Weights,
        engine: &Engine,
        dtype: WeightDtype,
    ) -> Result<Self> {
        let table = |name: &str| -> Result<Weight> {
            let weight = weights.matrix(name, [config.vocab_size, config.hidden_size])?;
            Weight::new(engine, &weight, dtype)
        };
        let norm = weights.get("model.norm.weight", &[config.hidden_size])?;
        let blocks = (0..config.layers.len())
            .map(|layer| Block::load(config, weights, engine, dtype, layer))
            .collect::<Result<_>>()?;
        let freqs = |rope: &super::Rope| (rope.inv_freq(), rope.attention_factor());
        Ok(Policy {
            embedding: table("model.embed_tokens.weight")?,
            head: match config.tie_word_embeddings {
                true => None,
                false => Some(table("lm_head.weight")?),
            },
            norm: norm.to_dtype(DType::F32)?.to_device(engine.device())?,
            inv_freqs: config.ropes.iter().map(freqs).collect(),
            blocks,
            engine: engine.clone(),
            config: config.clone(),
        })
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The engine that the policy runs on.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The same weights on the composed path: the oracle of the fused kernels.
    pub fn composed(mut self) -> Self {
        self.engine = self.engine.composed();
        self
    }

    /// The same weights with products of another precision.
    pub fn at_precision(&self, precision: MatmulPrecision) -> Self {
        let engine = self.engine.with_precision(precision);
        Policy { engine, ..self.clone() }
    }

    /// An empty cache of keys and values for [`Policy::hidden_cached`].
    pub fn kv_cache(&self) -> KvCache {
        KvCache::new(self.blocks.len(), &self.engine)
    }

    /// Bytes of all matrices in memory.
    pub fn bytes(&self) -> usize {
        let multiplied: usize = self.multiplied().map(Weight::bytes).sum();
        multiplied + self.head.as_ref().map_or(0, |_| self.embedding.bytes())
    }

    /// The matrices of which there are products.
    fn multiplied(&self) -> impl Iterator<Item = &Weight> {
        let blocks = self.blocks.iter().flat_map(Block::weights);
        blocks.chain([self.head.as_ref().unwrap_or(&self.embedding)])
    }

    /// Bytes that [`Policy::keep_rounded`] takes.
    pub fn rounded_bytes(&self) -> usize {
        self.multiplied().map(|weight| weight.rounded_bytes(&self.engine)).sum()
    }

    /// Rounds all matrices for as long as the result lives, instead of with every product, where products of
    /// the engine's precision multiply integers (`medium` on Intel without AMX): worth its memory where many
    /// passes follow. Does nothing where the machine has no room for them.
    pub fn keep_rounded(&self) -> Vec<Rounded> {
        if !free_memory::has_room(self.rounded_bytes()) {
            return Vec::new();
        }
        self.multiplied().filter_map(|weight| weight.keep_rounded(&self.engine)).collect()
    }

    /// The input of the first block, [N, D].
    pub fn embed(&self, input_ids: &[u32]) -> Result<Tensor> {
        let rows = self.embedding.rows(&self.engine, input_ids)?;
        match self.config.embedding_scale {
            None => Ok(rows),
            Some(scale) => Ok((rows * scale)?),
        }
    }

    /// The last block's output [N, D], before the final norm.
    pub fn hidden(&self, batch: &Batch, adapters: &[impl Hooks]) -> Result<Tensor> {
        let _phase = debug_span!("forward", tokens = batch.len()).entered();
        let parts = batch.parts(part_tokens());
        if parts.len() == 1 {
            let mut pass = self.pass(Cow::Borrowed(batch), adapters);
            return self.run(batch, &mut pass, &mut |_, _, _| Ok(()));
        }
        let hidden = parts.into_iter().map(|part| {
            let mut pass = self.pass(Cow::Borrowed(&part), adapters);
            self.run(&part, &mut pass, &mut |_, _, _| Ok(()))
        });
        Ok(Tensor::cat(&hidden.collect::<Result<Vec<_>>>()?, 0)?)
    }

    /// Like [`Policy::hidden`] for tokens that continue the sequences of a cache, which takes up
    /// their keys and values; segment i continues `slots[i]`.
    pub fn hidden_cached(
        &self,
        batch: &Batch,
        adapters: &[impl Hooks],
        cache: &mut KvCache,
        slots: &[SlotId],
    ) -> Result<Tensor> {
        let mut pass = self.pass(Cow::Borrowed(batch), adapters);
        pass.cache = Some(Cached { cache, slots, keeps: false, attended: None });
        self.run(batch, &mut pass, &mut |_, _, _| Ok(()))
    }

    /// [`Policy::hidden_cached`] that takes what the layers make at `rows` into `recording`. On the CPU.
    pub fn hidden_recorded(
        &self,
        batch: &Batch,
        adapters: &[impl Hooks],
        (cache, slots): (&mut KvCache, &[SlotId]),
        (recording, rows): (&mut Recording, &[u32]),
    ) -> Result<Tensor> {
        let mut pass = self.pass(Cow::Borrowed(batch), adapters);
        let keeps = recording.keeps_attention() && self.engine.keeps_bf16() && !rows.is_empty();
        pass.cache = Some(Cached { cache, slots, keeps, attended: None });
        if rows.is_empty() {
            return self.run(batch, &mut pass, &mut |_, _, _| Ok(()));
        }
        recording.begin();
        let lowest = lowest(self, adapters).min(self.blocks.len());
        self.run(batch, &mut pass, &mut |layer, out, attended| {
            let attended = attended.filter(|_| layer >= lowest);
            match layer + 1 >= lowest {
                true => recording.push(&self.engine, layer, (out, attended), rows),
                false => Ok(()),
            }
        })
    }

    /// The last block's output; `see` sees every layer.
    fn run(&self, batch: &Batch, pass: &mut Pass, see: &mut See) -> Result<Tensor> {
        let tape = Tape::off(&self.engine);
        let mut h = Value::constant(self.embed(&batch.input_ids)?);
        for (layer, block) in self.blocks.iter().enumerate() {
            let out = block.forward(&tape, layer, &h, pass)?;
            let attended = pass.cache.as_mut().and_then(|cached| cached.attended.take());
            see(layer, out.tensor(), attended.as_ref())?;
            h = pass.after_block(&tape, layer, out)?;
        }
        Ok(h.tensor().clone())
    }

    /// A forward pass from `embedded` [N, D] that can be differentiated in the adapters' parameters.
    ///
    /// With `checkpointing` a block keeps its input only and is computed again on the way back.
    pub fn trace<'a>(
        &'a self,
        batch: &Batch,
        embedded: Tensor,
        adapters: &'a [impl Hooks],
        checkpointing: bool,
    ) -> Result<Trace<'a>> {
        let _phase = debug_span!("forward", tokens = batch.len()).entered();
        Trace::new(self, embedded, batch, adapters, checkpointing)
    }

    /// [`Policy::trace`] of tokens that passes with the same adapters have recorded, segment by segment: no
    /// block is computed before the way back, which begins each from what is recorded of it.
    ///
    /// On the CPU. One block is computed whole nevertheless: that of layer `checked`, counted round and
    /// round from the lowest adapted one on.
    ///
    /// # Errors
    /// On the way back, if what is recorded is not what is computed, to the bit.
    pub fn retrace<'a>(
        &'a self,
        batch: &Batch,
        adapters: &'a [impl Hooks],
        recorded: &[&'a Recorded],
        checked: usize,
    ) -> Result<Trace<'a>> {
        let _phase = debug_span!("recorded", tokens = batch.len()).entered();
        Trace::recorded(self, batch, adapters, recorded, checked)
    }

    pub(super) fn pass<'a>(&self, batch: Cow<'a, Batch>, adapters: &'a [impl Hooks]) -> Pass<'a> {
        let rotary =
            |(freqs, factor): &(Vec<f32>, f32)| Rotary::new(&batch.positions, freqs, *factor);
        let rotaries = self.inv_freqs.iter().map(rotary).collect();
        let segments = batch.shared_segments();
        let adapters = adapters.iter().map(|adapter| adapter as &dyn Hooks).collect();
        Pass { batch, segments, rotaries, adapters, cache: None }
    }

    /// Logits [rows, V] of the given rows of the last block's output h [N, D].
    pub fn logits(&self, h: &Tensor, rows: &[u32]) -> Result<Tensor> {
        let _phase = debug_span!("head").entered();
        self.head().logits(&self.engine, h, rows)
    }

    /// [`Policy::logits`] into a vector, whose memory is used again from call to call.
    pub fn logits_into(&self, h: &Tensor, rows: &[u32], into: &mut Vec<f32>) -> Result<()> {
        let _phase = debug_span!("head").entered();
        self.head().logits_into(&self.engine, h, rows, into)
    }

    /// The head's transpose for [`Policy::drawn_gradients`]: its bytes once more, and those of its integers if
    /// they are to stay rounded as those of [`Policy::keep_rounded`]. On the CPU.
    ///
    /// # Errors
    /// Elsewhere.
    pub fn transposed_head(&self, keep_rounded: bool) -> Result<TransposedHead> {
        self.head().transposed(&self.engine, keep_rounded)
    }

    /// Bytes of [`Policy::transposed_head`], of its integers too where it has some.
    pub fn transposed_head_bytes(&self) -> usize {
        let head = self.head().weight;
        head.bytes() + head.rounded_bytes(&self.engine)
    }

    /// The gradient of the log-prob of each row's drawn token in what the head reads, the normed row of the last
    /// block's output, [rows, D], given the logits [rows, V], capped and divided by the temperature
    /// (overwritten), and their statistics.
    pub fn drawn_gradients(
        &self,
        head: &TransposedHead,
        logits: &mut [f32],
        drawn: &[(u32, RowStats)],
        temperature: f64,
    ) -> Vec<f32> {
        let _phase = debug_span!("head").entered();
        self.head().drawn_gradients(&self.engine, head, logits, drawn, temperature)
    }

    /// sum over t of `weights[t]` * log p(target t), where a target's row is a row of h [N, D], the
    /// last block's output; differentiable in h.
    pub fn weighted_logps(
        &self,
        tape: &Tape,
        h: &Value,
        targets: &[Target],
        weights: &[f32],
    ) -> Result<(Value, ops::Logps)> {
        let pull = Pull { targets, weights, dentropy: None };
        self.weighted_logps_under(tape, h, pull, Distribution::default())
    }

    /// A loss that is linear in log-probs and entropies of a distribution; otherwise as
    /// [`Policy::weighted_logps`].
    pub fn weighted_logps_under(
        &self,
        tape: &Tape,
        h: &Value,
        pull: Pull,
        distribution: Distribution,
    ) -> Result<(Value, ops::Logps)> {
        let _phase = debug_span!("head").entered();
        self.head().weighted_logps(tape, h, pull, distribution)
    }

    /// log p(target) of each target; otherwise as [`Policy::weighted_logps`].
    pub fn token_logps(
        &self,
        tape: &Tape,
        h: &Value,
        targets: &[Target],
    ) -> Result<(Value, ops::Logps)> {
        let _phase = debug_span!("head").entered();
        self.head().token_logps(tape, h, targets)
    }

    fn head(&self) -> Head<'_> {
        Head {
            norm: &self.norm,
            eps: self.config.rms_norm_eps,
            plus_one: self.config.norm_plus_one,
            weight: self.head.as_ref().unwrap_or(&self.embedding),
            softcap: self.config.final_logit_softcapping,
        }
    }
}
