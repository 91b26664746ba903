//! One transformer block with its steering sites.
//!
//! Pre-norm:        h' = h + Attn(Norm(h)),         out = h' + MLP(Norm(h'))
//! Sandwich norms:  h' = h + Norm(Attn(Norm(h))),   out = h' + Norm(MLP(Norm(h')))
//!
//! A site is a place in this graph: `post_attention` and `post_mlp` are what is added to the residual
//! stream, `pre_mlp` the normed input of the MLP, `post_block` the stream after the second addition.

use std::borrow::Cow;
use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::config::{Activation, Matrix, ModelConfig};
use super::hooks::{Hooks, Site};
use super::recording::{self, KnownAttention, Recorded};
use super::weights::Weights;
use super::{Batch, matrix_name};
use crate::Result;
use crate::ops::{self, Attended, AttentionShape, Engine, GluActivation, KvCache, Rotary, Segment};
use crate::ops::{SlotId, Tape, Value, Weight, WeightDtype};

/// A frozen linear map and its bias.
#[derive(Clone)]
struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
}

/// The frozen weights of one block.
#[derive(Clone)]
pub(super) struct Block {
    linears: Vec<Linear>,
    input_norm: Tensor,
    mlp_norm: Tensor,
    post_attention_norm: Option<Tensor>,
    post_mlp_norm: Option<Tensor>,
    head_norms: Option<(Tensor, Tensor)>,
    shape: AttentionShape,
    rope: usize,
    act: GluActivation,
    eps: f64,
    plus_one: bool,
}

/// What the blocks of one forward pass share.
pub(super) struct Pass<'a> {
    pub(super) batch: Cow<'a, Batch>,
    pub(super) segments: Arc<[Segment]>,
    pub(super) rotaries: Vec<Rotary>,
    pub(super) adapters: Vec<&'a dyn Hooks>,
    pub(super) cache: Option<Cached<'a>>,
}

/// The cache that a pass goes on from and adds to.
pub(super) struct Cached<'a> {
    pub(super) cache: &'a mut KvCache,
    /// The sequence of each segment.
    pub(super) slots: &'a [SlotId],
    /// Whether what attention made of the last layer is left in `attended`.
    pub(super) keeps: bool,
    pub(super) attended: Option<Attended>,
}

/// What is known of a block's work when it is computed for the way back.
pub(super) struct Known {
    /// Its output [N, D], before what adapters add to it.
    pub(super) out: Tensor,
    pub(super) attention: Option<KnownAttention>,
}

impl Block {
    /// Loads layer `layer`, its matrices stored as `dtype`.
    pub(super) fn load(
        config: &ModelConfig,
        weights: &Weights,
        engine: &Engine,
        dtype: WeightDtype,
        layer: usize,
    ) -> Result<Self> {
        let small = |name: &str, len: usize| -> Result<Tensor> {
            let tensor = weights.get(&format!("model.layers.{layer}.{name}"), &[len])?;
            Ok(tensor.to_dtype(DType::F32)?.to_device(engine.device())?)
        };
        let linears = Matrix::ALL.map(|matrix| -> Result<Linear> {
            let (inputs, outputs) = config.linear_shape(matrix);
            let weight = weights.matrix(&matrix_name(layer, matrix), [outputs, inputs])?;
            let weight = Weight::new(engine, &weight, dtype)?;
            let bias = config
                .has_bias(matrix)
                .then(|| small(&format!("{}.bias", matrix.module()), outputs))
                .transpose()?;
            Ok(Linear { weight, bias })
        });
        let norm = |name: &str| small(&format!("{name}.weight"), config.hidden_size);
        let sandwich = |name: &str| config.sandwich_norms.then(|| norm(name)).transpose();
        let (mlp, post) = match config.sandwich_norms {
            true => ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
            false => ("post_attention_layernorm", "post_feedforward_layernorm"),
        };
        let head = |name: &str| small(&format!("self_attn.{name}.weight"), config.head_dim);
        let head_norms = match config.qk_norm {
            true => Some((head("q_norm")?, head("k_norm")?)),
            false => None,
        };
        Ok(Block {
            linears: linears.into_iter().collect::<Result<_>>()?,
            input_norm: norm("input_layernorm")?,
            mlp_norm: norm(mlp)?,
            post_attention_norm: sandwich("post_attention_layernorm")?,
            post_mlp_norm: sandwich(post)?,
            head_norms,
            shape: AttentionShape {
                heads: config.num_attention_heads,
                kv_heads: config.num_key_value_heads,
                head_dim: config.head_dim,
                scale: config.attention_scale as f32,
                window: config.layers[layer].window,
                softcap: None,
                rounded: false, // the engine's to say
            },
            rope: config.layers[layer].rope,
            act: match config.hidden_act {
                Activation::Silu => GluActivation::Silu,
                Activation::GeluTanh => GluActivation::GeluTanh,
                Activation::Gelu => GluActivation::Gelu,
            },
            eps: config.rms_norm_eps,
            plus_one: config.norm_plus_one,
        })
    }

    /// The block's matrices.
    pub(super) fn weights(&self) -> impl Iterator<Item = &Weight> {
        self.linears.iter().map(|linear| &linear.weight)
    }

    /// The block's output [N, D] for its input h [N, D], before what adapters add to it
    /// ([`Pass::after_block`]).
    pub(super) fn forward(
        &self,
        tape: &Tape,
        layer: usize,
        h: &Value,
        pass: &mut Pass,
    ) -> Result<Value> {
        let mixed = self.mixed(tape, layer, h, pass)?;
        let (h, inner) = self.middle(tape, layer, (h, mixed), pass)?;
        self.last(tape, layer, (&h, &inner), pass)
    }

    /// [`Block::forward`] for the way back alone: products whose results are known are left out unless something
    /// after them reads what is not known, and everything is where no gradient goes further down.
    pub(super) fn forward_known(
        &self,
        tape: &Tape,
        layer: usize,
        (h, known): (&Value, &Known),
        pass: &mut Pass,
    ) -> Result<Value> {
        let steered = self.post_mlp_norm.is_some() || pass.steers(layer, Site::PostMlp);
        if !h.is_tracked() && pass.acts_last() && !steered {
            return Ok(Value::constant(known.out.clone()));
        }
        let mixed = match &known.attention {
            None => self.mixed(tape, layer, h, pass)?,
            Some(known) => self.mixed_known(tape, layer, (h, known), pass)?,
        };
        let (h, inner) = self.middle(tape, layer, (h, mixed), pass)?;
        if steered {
            return self.last(tape, layer, (&h, &inner), pass);
        }
        let [map] = self.maps(tape, layer, [Matrix::Down], &inner, pass)?;
        let [y] = ops::linears_known(tape, &inner, [map], [Some(&known.out)])?;
        Ok(ops::add_known(tape, &h, &y, known.out.clone()))
    }

    /// [`Block::forward`] that tells whether what is known of it is what it computes, to the bit.
    pub(super) fn forward_checked(
        &self,
        tape: &Tape,
        layer: usize,
        (h, known): (&Value, &Known),
        pass: &mut Pass,
    ) -> Result<(Value, bool)> {
        let (q, k, v) = self.heads(tape, layer, h, pass)?;
        let qkv = (q.tensor(), k.tensor(), v.tensor());
        let attended = ops::attend(tape.engine(), qkv, &pass.segments, &self.shape, true)?;
        let attention = known.attention.as_ref();
        let mut same = attention.map_or(Ok(true), |known| known.is((&k, &v), &attended))?;
        let (qkv, segments) = ((&q, &k, &v), &pass.segments);
        let mixed = ops::attention_known(tape, qkv, segments, &self.shape, attended)?;
        let (h, inner) = self.middle(tape, layer, (h, mixed), pass)?;
        let out = self.last(tape, layer, (&h, &inner), pass)?;
        same &= ops::equal_bits(&known.out, out.tensor())?;
        Ok((out, same))
    }

    /// What is known of the attention of a layer at the tokens of a batch's segments.
    pub(super) fn known_attention(
        &self,
        engine: &Engine,
        layer: usize,
        of: (&[&Recorded], &[Segment]),
    ) -> Result<Option<KnownAttention>> {
        recording::attention(engine, of, layer, &self.shape)
    }

    /// The block's output, given the stream [N, D] after attention and the input [N, F] of the MLP's last matrix.
    fn last(
        &self,
        tape: &Tape,
        layer: usize,
        (h, inner): (&Value, &Value),
        pass: &mut Pass,
    ) -> Result<Value> {
        let [y] = self.linears(tape, layer, [Matrix::Down], inner, pass)?;
        let y = self.sandwich(tape, y, &self.post_mlp_norm)?;
        let y = pass.shift(tape, layer, Site::PostMlp, y)?;
        ops::add(tape, h, &y)
    }

    /// From the results of attention to the stream [N, D] that the MLP adds to, and the input [N, F] of its last
    /// matrix.
    fn middle(
        &self,
        tape: &Tape,
        layer: usize,
        (h, mixed): (&Value, Value),
        pass: &mut Pass,
    ) -> Result<(Value, Value)> {
        let [attended] = self.linears(tape, layer, [Matrix::O], &mixed, pass)?;
        drop(mixed);
        let attended = self.sandwich(tape, attended, &self.post_attention_norm)?;
        let attended = pass.shift(tape, layer, Site::PostAttention, attended)?;
        let h = ops::add(tape, h, &attended)?;
        let x = self.norm(tape, &h, &self.mlp_norm)?;
        let x = pass.shift(tape, layer, Site::PreMlp, x)?;
        let [gate, up] = self.linears(tape, layer, [Matrix::Gate, Matrix::Up], &x, pass)?;
        let inner = ops::glu(tape, &gate, &up, self.act)?;
        Ok((h, inner))
    }

    /// The results of attention, [N, heads * head_dim].
    fn mixed(&self, tape: &Tape, layer: usize, h: &Value, pass: &mut Pass) -> Result<Value> {
        let (q, k, v) = self.heads(tape, layer, h, pass)?;
        let Some(Cached { cache, slots, keeps, attended }) = &mut pass.cache else {
            return ops::attention(tape, (&q, &k, &v), &pass.segments, &self.shape);
        };
        let now = ops::attention_cached(
            tape.engine(),
            (q.tensor(), k.tensor(), v.tensor()),
            &pass.segments,
            (cache, slots, layer),
            (&self.shape, *keeps),
        )?;
        let mixed = Value::constant(now.out.clone());
        *attended = Some(now).filter(|_| *keeps);
        Ok(mixed)
    }

    /// [`Block::mixed`] where keys and values are known, and maybe the results.
    fn mixed_known(
        &self,
        tape: &Tape,
        layer: usize,
        (h, known): (&Value, &KnownAttention),
        pass: &mut Pass,
    ) -> Result<Value> {
        let KnownAttention { k: keys, v: values, attended } = known;
        let x = self.norm(tape, h, &self.input_norm)?;
        let maps = self.maps(tape, layer, [Matrix::Q, Matrix::K, Matrix::V], &x, pass)?;
        // the way back through a norm of keys reads what was normed
        let unnormed = Some(keys).filter(|_| self.head_norms.is_none());
        let [q, k, v] = ops::linears_known(tape, &x, maps, [None, unnormed, Some(values)])?;
        let (q_norm, k_norm) = self.head_norms.as_ref().map(|(q, k)| (q, k)).unzip();
        let q = self.turned(tape, q, q_norm, pass)?;
        let k = k_norm.map_or(Ok(k.clone()), |norm| self.norm(tape, &k, norm))?;
        let k = ops::rotate_known(tape, &k, &pass.rotaries[self.rope], keys.clone());
        match attended.clone() {
            None => ops::attention(tape, (&q, &k, &v), &pass.segments, &self.shape),
            Some(attended) => {
                ops::attention_known(tape, (&q, &k, &v), &pass.segments, &self.shape, attended)
            }
        }
    }

    /// Queries, keys and values of the heads, the latter two as the cache holds them.
    fn heads(
        &self,
        tape: &Tape,
        layer: usize,
        h: &Value,
        pass: &Pass,
    ) -> Result<(Value, Value, Value)> {
        let x = self.norm(tape, h, &self.input_norm)?;
        let [q, k, v] = self.linears(tape, layer, [Matrix::Q, Matrix::K, Matrix::V], &x, pass)?;
        let (q_norm, k_norm) = self.head_norms.as_ref().map(|(q, k)| (q, k)).unzip();
        let (q, k) = (self.turned(tape, q, q_norm, pass)?, self.turned(tape, k, k_norm, pass)?);
        Ok((q, ops::as_cached(tape, &k)?, ops::as_cached(tape, &v)?))
    }

    /// Queries or keys normed, if they are, and rotated.
    fn turned(&self, tape: &Tape, y: Value, norm: Option<&Tensor>, pass: &Pass) -> Result<Value> {
        let y = norm.map_or(Ok(y.clone()), |norm| self.norm(tape, &y, norm))?;
        ops::rotate(tape, &y, &pass.rotaries[self.rope])
    }

    /// The results of matrices with the same input x [N, in].
    fn linears<const N: usize>(
        &self,
        tape: &Tape,
        layer: usize,
        matrices: [Matrix; N],
        x: &Value,
        pass: &Pass,
    ) -> Result<[Value; N]> {
        ops::linears(tape, x, self.maps(tape, layer, matrices, x, pass)?)
    }

    /// The matrices with what adapters add to them, for the input x [N, in].
    fn maps<const N: usize>(
        &self,
        tape: &Tape,
        layer: usize,
        matrices: [Matrix; N],
        x: &Value,
        pass: &Pass,
    ) -> Result<[ops::Linear<'_>; N]> {
        let mut maps = matrices.map(|matrix| {
            let Linear { weight, bias } = &self.linears[matrix as usize];
            ops::Linear { weight, bias: bias.as_ref(), updates: Vec::new() }
        });
        for (map, matrix) in maps.iter_mut().zip(matrices) {
            for adapter in &pass.adapters {
                map.updates.extend(adapter.update(tape, layer, matrix, x, &pass.batch)?);
            }
        }
        Ok(maps)
    }

    fn norm(&self, tape: &Tape, x: &Value, weight: &Tensor) -> Result<Value> {
        ops::rms_norm(tape, x, weight, self.eps, self.plus_one)
    }

    fn sandwich(&self, tape: &Tape, y: Value, weight: &Option<Tensor>) -> Result<Value> {
        weight.as_ref().map_or(Ok(y.clone()), |weight| self.norm(tape, &y, weight))
    }
}

impl Pass<'_> {
    /// Whether nothing goes back through the lowest adapted block's matrices.
    pub(super) fn acts_last(&self) -> bool {
        self.adapters.iter().all(|adapter| adapter.acts_last())
    }

    fn steers(&self, layer: usize, site: Site) -> bool {
        self.adapters.iter().any(|adapter| adapter.steers(layer, site))
    }

    /// What adapters make of a block's output h [N, D].
    pub(super) fn after_block(&self, tape: &Tape, layer: usize, h: Value) -> Result<Value> {
        self.shift(tape, layer, Site::PostBlock, h)
    }

    fn shift(&self, tape: &Tape, layer: usize, site: Site, h: Value) -> Result<Value> {
        self.adapters
            .iter()
            .try_fold(h, |h, adapter| adapter.shift(tape, layer, site, h, &self.batch))
    }
}
