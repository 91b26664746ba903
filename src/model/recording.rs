//! What passes over a cache computed, so that a later pass over the same tokens need not.

use std::sync::Arc;

use candle_core::Tensor;
use half::bf16;

use crate::ops::{
    Attended, AttentionShape, Engine, KvCache, Segment, SlotId, Value, cached_keys, equal_bits,
    pick_rows, pick_rows_bf16,
};
use crate::{Error, Result};

/// What passes of a policy computed that the way back reads: the outputs of blocks, before what adapters add
/// after a block, from the block below the lowest adapter on, and if wanted keys, values and results of attention.
#[derive(Debug, Default)]
pub struct Recording {
    /// Whether what attention reads and makes is kept.
    attention: bool,
    /// Of each pass what its layers made, from a first one on.
    passes: Vec<Vec<Made>>,
    /// The cache that the passes went over, if its keys and values are kept.
    cache: Option<KvCache>,
    /// What [`Policy::drawn_gradients`](super::Policy::drawn_gradients) gave each time, [rows, D], and D.
    drawn: Vec<(Vec<f32>, usize)>,
}

/// What a layer made in one pass.
#[derive(Debug)]
struct Made {
    layer: usize,
    /// The block's output, [N, D].
    output: Tensor,
    /// The results of attention, [N, heads * head_dim], which are bf16 numbers, and their denominators, [N, heads].
    attended: Option<(Vec<bf16>, Vec<f32>)>,
}

/// A token in a [`Recording`]: its pass, and its row there.
pub type RecordedRow = (u32, u32);

/// Tokens of a sequence in a recording.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// The recording.
    pub recording: Arc<Recording>,
    /// The tokens, one after the other.
    pub rows: Vec<RecordedRow>,
    /// The sequence that took them up, in the recording's cache.
    pub slot: SlotId,
    /// The gradients of a completion's drawn tokens, the last one too; empty where they were not taken.
    pub drawn: Vec<RecordedRow>,
}

impl Recorded {
    /// The gradient of the log-prob of the completion's token `t` in what the head read, `[D]`, if it was taken.
    pub fn gradient(&self, t: usize) -> Option<&[f32]> {
        let (time, row) = *self.drawn.get(t)?;
        let (gradients, d) = self.recording.drawn.get(time as usize)?;
        gradients.get(row as usize * d..(row as usize + 1) * d)
    }
}

/// Recordings are equal if they name the same rows of passes: what they hold follows from tokens and adapters, and
/// whether gradients were taken changes no result.
impl PartialEq for Recorded {
    fn eq(&self, other: &Self) -> bool {
        self.rows == other.rows
    }
}

impl Recording {
    /// An empty recording; with `attention` it keeps what attention reads and makes.
    pub fn new(attention: bool) -> Self {
        Recording { attention, ..Recording::default() }
    }

    /// Whether what attention reads and makes is kept.
    pub fn keeps_attention(&self) -> bool {
        self.attention
    }

    /// Passes that were taken in: the number of the next one.
    pub fn passes(&self) -> u32 {
        self.passes.len() as u32
    }

    /// Takes in gradients of drawn tokens, [rows, D]: the number of what names them.
    pub fn push_drawn(&mut self, gradients: Vec<f32>, d: usize) -> u32 {
        self.drawn.push((gradients, d));
        self.drawn.len() as u32 - 1
    }

    /// Takes in the cache that the passes went over, the sequences still open, if attention is kept and the cache
    /// has pages.
    pub fn take_cache(&mut self, cache: KvCache) {
        self.cache = Some(cache).filter(|cache| self.attention && cache.pages_held() > 0);
    }

    /// Begins a pass.
    pub(super) fn begin(&mut self) {
        self.passes.push(Vec::new());
    }

    /// Takes in `rows` of what a layer of the present pass made: the block's output [N, D], and the results of
    /// attention if they are kept.
    pub(super) fn push(
        &mut self,
        engine: &Engine,
        layer: usize,
        (output, attended): (&Tensor, Option<&Attended>),
        rows: &[u32],
    ) -> Result<()> {
        let output = match output.dim(0)? == rows.len() {
            true => output.clone(),
            false => {
                let places: Vec<_> = rows.iter().map(|row| (output, *row as usize)).collect();
                pick_rows(engine, &places)?
            }
        };
        let attended = attended.map(|attended| attended.narrowed(rows)).transpose()?;
        if let Some(pass) = self.passes.last_mut() {
            pass.push(Made { layer, output, attended });
        }
        Ok(())
    }

    fn made(&self, pass: u32, layer: usize) -> Result<&Made> {
        let layers = self.passes.get(pass as usize);
        let place = layers.and_then(|layers| layer.checked_sub(layers.first()?.layer));
        let made = layers.zip(place).and_then(|(layers, place)| layers.get(place));
        made.ok_or_else(|| Error::failure(format!("layer {layer} was not recorded")))
    }
}

/// The output of a layer's block at the tokens of these segments, one after the other, [N, D].
pub(super) fn outputs(engine: &Engine, segments: &[&Recorded], layer: usize) -> Result<Tensor> {
    let mut rows = Vec::new();
    for (recording, pass, row) in tokens(segments) {
        rows.push((&recording.made(pass, layer)?.output, row));
    }
    pick_rows(engine, &rows)
}

/// What attention reads and makes in one layer.
#[derive(Debug)]
pub(super) struct KnownAttention {
    /// Keys as the cache holds them, [N, kv_heads * head_dim].
    pub k: Tensor,
    /// Values as the cache holds them, [N, kv_heads * head_dim].
    pub v: Tensor,
    /// The results.
    pub attended: Option<Attended>,
}

impl KnownAttention {
    /// Whether these are the keys, values and results, as far as they are known, to the bit.
    pub fn is(&self, (k, v): (&Value, &Value), attended: &Attended) -> Result<bool> {
        let results = self.attended.as_ref().map_or(Ok(true), |known| known.equals(attended))?;
        Ok(results && equal_bits(&self.k, k.tensor())? && equal_bits(&self.v, v.tensor())?)
    }
}

/// What attention reads and makes in a layer at the tokens of these segments of a batch, if it was kept of all.
pub(super) fn attention(
    engine: &Engine,
    (recorded, segments): (&[&Recorded], &[Segment]),
    layer: usize,
    shape: &AttentionShape,
) -> Result<Option<KnownAttention>> {
    let caches = recorded.iter().zip(segments).map(|(recorded, segment)| {
        let cache = recorded.recording.cache.as_ref()?;
        Some((*segment, cache, recorded.slot))
    });
    let Some(caches) = caches.collect::<Option<Vec<_>>>() else { return Ok(None) };
    let (k, v) = cached_keys(engine, &caches, layer, shape)?;
    let (mut rows, mut lse) = (Vec::new(), Vec::new());
    let (width, heads) = (shape.heads * shape.head_dim, shape.heads);
    for (recording, pass, row) in tokens(recorded) {
        let Some((out, denominators)) = &recording.made(pass, layer)?.attended else {
            return Ok(Some(KnownAttention { k, v, attended: None }));
        };
        rows.push(&out[row * width..(row + 1) * width]);
        lse.extend_from_slice(&denominators[row * heads..(row + 1) * heads]);
    }
    let attended = Attended { out: pick_rows_bf16(engine, &rows, width)?, lse: lse.into() };
    Ok(Some(KnownAttention { k, v, attended: Some(attended) }))
}

/// The tokens of these segments: recording, pass and row.
fn tokens<'a>(segments: &'a [&Recorded]) -> impl Iterator<Item = (&'a Recording, u32, usize)> {
    segments.iter().flat_map(|Recorded { recording, rows, .. }| {
        rows.iter().map(|(pass, row)| (&**recording, *pass, *row as usize))
    })
}
