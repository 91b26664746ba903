//! The policy: a frozen decoder that adapters hook into.

use candle_core::{DType, Tensor};
use tracing::debug_span;

use super::batch::Batch;
use super::block::{Block, Pass};
use super::config::ModelConfig;
use super::trace::Trace;
use super::weights::Weights;
use crate::Result;
use crate::adapter::Adapter;
use crate::ops::{self, Engine, KvCache, Rotary, SlotId, Tape, Target, Value, Weight, WeightDtype};

/// A decoder-only language model of any supported family, all its weights frozen.
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

    /// Bytes of all matrices in memory.
    pub fn bytes(&self) -> usize {
        let blocks: usize = self.blocks.iter().map(Block::bytes).sum();
        blocks + self.embedding.bytes() + self.head.as_ref().map_or(0, Weight::bytes)
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
    pub fn hidden(&self, batch: &Batch, adapters: &[Box<dyn Adapter>]) -> Result<Tensor> {
        let _phase = debug_span!("forward", tokens = batch.len()).entered();
        let mut pass = self.pass(batch, adapters);
        self.run(batch, &mut pass)
    }

    /// Like [`Policy::hidden`] for tokens that continue the sequences of a cache, which takes up
    /// their keys and values; segment i continues `slots[i]`.
    pub fn hidden_cached(
        &self,
        batch: &Batch,
        adapters: &[Box<dyn Adapter>],
        cache: &mut KvCache,
        slots: &[SlotId],
    ) -> Result<Tensor> {
        let mut pass = self.pass(batch, adapters);
        pass.cache = Some((cache, slots));
        self.run(batch, &mut pass)
    }

    fn run(&self, batch: &Batch, pass: &mut Pass) -> Result<Tensor> {
        let tape = Tape::off(&self.engine);
        let mut h = Value::constant(self.embed(&batch.input_ids)?);
        for (layer, block) in self.blocks.iter().enumerate() {
            h = block.forward(&tape, layer, &h, pass)?;
        }
        Ok(h.tensor().clone())
    }

    /// A forward pass from `embedded` [N, D] that can be differentiated in the adapters' parameters.
    ///
    /// With `checkpointing` a block keeps its input only and is computed again on the way back.
    pub fn trace<'a>(
        &'a self,
        batch: &'a Batch,
        embedded: Tensor,
        adapters: &'a [Box<dyn Adapter>],
        checkpointing: bool,
    ) -> Result<Trace<'a>> {
        let _phase = debug_span!("forward", tokens = batch.len()).entered();
        Trace::new(self, embedded, self.pass(batch, adapters), checkpointing)
    }

    pub(super) fn pass<'a>(&self, batch: &'a Batch, adapters: &'a [Box<dyn Adapter>]) -> Pass<'a> {
        let rotary =
            |(freqs, factor): &(Vec<f32>, f32)| Rotary::new(&batch.positions, freqs, *factor);
        let rotaries = self.inv_freqs.iter().map(rotary).collect();
        let segments = batch.shared_segments();
        Pass { batch, segments, rotaries, adapters, cache: None }
    }

    /// Logits [rows, V] of the given rows of the last block's output h [N, D].
    pub fn logits(&self, h: &Tensor, rows: &[u32]) -> Result<Tensor> {
        let _phase = debug_span!("head").entered();
        let tape = Tape::off(&self.engine);
        let normed = self.normed_rows(&tape, &Value::constant(h.clone()), rows)?;
        ops::logits(&tape, normed.tensor(), self.head(), self.config.final_logit_softcapping)
    }

    /// [`Policy::logits`] into a vector, whose memory is used again from call to call.
    pub fn logits_into(&self, h: &Tensor, rows: &[u32], into: &mut Vec<f32>) -> Result<()> {
        let tape = Tape::off(&self.engine);
        let normed = self.normed_rows(&tape, &Value::constant(h.clone()), rows)?;
        let softcap = self.config.final_logit_softcapping;
        ops::logits_into(&tape, normed.tensor(), self.head(), softcap, into)
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
        let _phase = debug_span!("head").entered();
        let (rows, targets) = compact(targets);
        let normed = self.normed_rows(tape, h, &rows)?;
        let softcap = self.config.final_logit_softcapping;
        ops::weighted_logps(tape, &normed, self.head(), (&targets, weights), softcap)
    }

    /// log p(target) of each target; otherwise as [`Policy::weighted_logps`].
    pub fn token_logps(
        &self,
        tape: &Tape,
        h: &Value,
        targets: &[Target],
    ) -> Result<(Value, ops::Logps)> {
        let _phase = debug_span!("head").entered();
        let (rows, targets) = compact(targets);
        let normed = self.normed_rows(tape, h, &rows)?;
        let softcap = self.config.final_logit_softcapping;
        ops::token_logps(tape, &normed, self.head(), &targets, softcap)
    }

    fn normed_rows(&self, tape: &Tape, h: &Value, rows: &[u32]) -> Result<Value> {
        let picked = ops::gather_rows(tape, h, rows)?;
        ops::rms_norm(
            tape,
            &picked,
            &self.norm,
            self.config.rms_norm_eps,
            self.config.norm_plus_one,
        )
    }

    fn head(&self) -> &Weight {
        self.head.as_ref().unwrap_or(&self.embedding)
    }
}

/// The distinct rows of `targets` in order, and the targets by their place among them.
fn compact(targets: &[Target]) -> (Vec<u32>, Vec<Target>) {
    let mut rows: Vec<u32> = Vec::with_capacity(targets.len());
    let mut placed = Vec::with_capacity(targets.len());
    for target in targets {
        if rows.last() != Some(&target.row) {
            rows.push(target.row);
        }
        placed.push(Target { row: rows.len() as u32 - 1, token: target.token });
    }
    (rows, placed)
}
