//! Keys and values of sequences that are being generated.

use std::ops::Range;

use candle_core::Tensor;
use tracing::trace_span;

use super::engine::{Engine, host};
use super::page_pool::PagePool;
use crate::kernels::attention::{AttentionShape, Segment};
use crate::kernels::attention_cached::{CachedSegment, LayerPages};
use crate::kernels::pages::{PAGE, Page, PageDtype, PageRows, PageShape, read_rows, write_rows};
use crate::kernels::slices::room;
use crate::{Error, Result};

/// Names one sequence of a [`KvCache`].
pub type SlotId = usize;

/// Keys and values per layer and sequence; sequences may share a beginning.
///
/// On the CPU they lie in pages of 64 positions. A fork holds its parent's pages, and a page with
/// several holders is copied when one of them writes to it, so the samples of a prompt have one
/// copy of it but for the last, unfilled page.
#[derive(Debug, Default)]
pub struct KvCache {
    layers: usize,
    dtype: PageDtype,
    slots: Vec<Option<Slot>>,
    pool: PagePool,
}

#[derive(Debug, Default)]
struct Slot {
    len: usize,
    pages: Vec<u32>,
    /// Keys and values of each layer, [len, kv_heads * head_dim], on a device without pages.
    tensors: Vec<(Tensor, Tensor)>,
}

impl KvCache {
    /// An empty cache for a model of `layers` layers that runs on `engine`: of bf16 numbers at `medium` on
    /// the CPU, else of f32.
    pub fn new(layers: usize, engine: &Engine) -> Self {
        KvCache { layers, dtype: engine.kv_dtype(), ..KvCache::default() }
    }

    /// Opens an empty sequence.
    pub fn open(&mut self) -> SlotId {
        self.put(Slot::default())
    }

    /// Opens a sequence that begins with the first `len` tokens of another one.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn fork(&mut self, id: SlotId, len: usize) -> Result<SlotId> {
        let Some(parent) = &self.slots[id] else { return Ok(self.open()) };
        let len = len.min(parent.len);
        let pages = parent.pages.iter().take(len.div_ceil(PAGE)).copied().collect::<Vec<_>>();
        let first = |(k, v): &(Tensor, Tensor)| Ok((k.narrow(0, 0, len)?, v.narrow(0, 0, len)?));
        let tensors = parent.tensors.iter().map(first).collect::<Result<_>>()?;
        pages.iter().for_each(|page| self.pool.hold(*page));
        Ok(self.put(Slot { len, pages, tensors }))
    }

    fn put(&mut self, slot: Slot) -> SlotId {
        let id = self.slots.iter().position(Option::is_none).unwrap_or(self.slots.len());
        self.slots.resize_with(self.slots.len().max(id + 1), || None);
        self.slots[id] = Some(slot);
        id
    }

    /// Gives up a sequence; memory that only it held is used again.
    pub fn close(&mut self, id: SlotId) {
        let pages = self.slots[id].take().map_or_else(Vec::new, |slot| slot.pages);
        pages.into_iter().for_each(|page| self.pool.give_up(page));
    }

    /// Tokens in the sequence: the position of its next one.
    pub fn len(&self, id: SlotId) -> usize {
        self.slots[id].as_ref().map_or(0, |slot| slot.len)
    }

    /// Whether no sequence is open.
    pub fn is_empty(&self) -> bool {
        self.slots.iter().all(Option::is_none)
    }

    /// Pages of 64 positions that open sequences hold.
    pub fn pages_held(&self) -> usize {
        self.pool.held()
    }

    /// Appends each segment's rows of k and v [N, kv_heads * head_dim] to its slot's layer; the
    /// slot has grown when its last layer has.
    pub(super) fn append(
        &mut self,
        engine: &Engine,
        layer: usize,
        (segments, slots): (&[Segment], &[SlotId]),
        (k, v): (&Tensor, &Tensor),
        shape: &AttentionShape,
    ) -> Result<()> {
        if engine.kv_dtype() != self.dtype {
            return Err(Error::failure(
                "a cache of keys and values is of another matmul_precision than the pass that reads it",
            ));
        }
        let parts = self.page_shape(shape);
        let mut rows = Vec::with_capacity(segments.len());
        for (segment, id) in segments.iter().zip(slots) {
            let Some(slot) = &mut self.slots[*id] else { continue };
            if !engine.fused() {
                slot.extend(layer, segment, (k, v))?;
            } else if layer == 0 {
                slot.reserve(segment.len, parts, &mut self.pool);
            }
            rows.extend(slot.place(slot.len, segment.start..segment.start + segment.len));
            if layer + 1 == self.layers {
                slot.len += segment.len;
            }
        }
        if engine.fused() {
            write_rows(self.pool.pages_mut(), parts, layer, rows, (&host(k)?, &host(v)?));
        }
        Ok(())
    }

    /// The pages of a layer.
    pub(super) fn layer(&self, layer: usize, shape: &AttentionShape) -> LayerPages<'_> {
        LayerPages { pages: self.pool.pages(), shape: self.page_shape(shape), layer }
    }

    fn page_shape(&self, shape: &AttentionShape) -> PageShape {
        let AttentionShape { kv_heads, head_dim, .. } = *shape;
        PageShape { layers: self.layers, kv_heads, head_dim, dtype: self.dtype }
    }

    /// Where the keys and values of tokens from `position` of a slot on lie that are rows `rows` of a batch.
    fn rows(
        &self,
        id: SlotId,
        position: usize,
        rows: Range<usize>,
    ) -> Result<Vec<(&Page, PageRows)>> {
        let slot = self.slots.get(id).and_then(Option::as_ref);
        let slot = slot.filter(|slot| position + rows.len() <= slot.len);
        let slot =
            slot.ok_or_else(|| Error::failure("a cache lacks keys of a sequence; this is a bug"))?;
        let pages = self.pool.pages();
        Ok(slot.place(position, rows).map(|part| (&pages[part.page as usize], part)).collect())
    }

    /// A segment and the pages of the slot that it was appended to.
    pub(super) fn segment(&self, segment: &Segment, id: SlotId) -> CachedSegment<'_> {
        let pages = self.slots[id].as_ref().map_or(&[][..], |slot| &slot.pages);
        let Segment { start, len, position0, .. } = *segment;
        CachedSegment { start, len, position0, pages }
    }

    /// Keys and values of a slot's layer, [keys, kv_heads * head_dim], on a device without pages.
    pub(super) fn tensors(&self, id: SlotId, layer: usize) -> Option<&(Tensor, Tensor)> {
        self.slots[id].as_ref().and_then(|slot| slot.tensors.get(layer))
    }
}

/// Keys and values [N, kv_heads * head_dim] of a layer of segments of a batch, each given with the cache and the
/// slot that took them up. On the CPU.
///
/// # Errors
/// If a slot lacks a token.
pub fn cached_keys(
    engine: &Engine,
    segments: &[(Segment, &KvCache, SlotId)],
    layer: usize,
    shape: &AttentionShape,
) -> Result<(Tensor, Tensor)> {
    let (mut parts, mut tokens) = (Vec::new(), 0);
    for (Segment { start, len, position0, .. }, cache, slot) in segments {
        parts.extend(cache.rows(*slot, *position0, *start..*start + *len)?);
        tokens += len;
    }
    let width = shape.kv_heads * shape.head_dim;
    let _span =
        trace_span!("cached keys", bytes = 2 * (4 + engine.kv_bytes()) * tokens * width).entered();
    let (mut k, mut v) = (room(tokens * width), room(tokens * width));
    if let Some((_, cache, _)) = segments.first() {
        read_rows(parts, cache.page_shape(shape), layer, (&mut k, &mut v));
    }
    Ok((engine.tensor(k, &[tokens, width])?, engine.tensor(v, &[tokens, width])?))
}

impl Slot {
    /// Makes room for `new` tokens in pages of its own.
    fn reserve(&mut self, new: usize, shape: PageShape, pool: &mut PagePool) {
        if let Some(last) = self.pages.get_mut(self.len / PAGE) {
            *last = pool.own(*last, shape);
        }
        while self.pages.len() * PAGE < self.len + new {
            self.pages.push(pool.take(shape));
        }
    }

    /// In which of the pages the positions from `position` on lie, as many as `rows`.
    fn place(&self, position: usize, rows: Range<usize>) -> impl Iterator<Item = PageRows> {
        let pages = self.pages.iter().enumerate().skip(position / PAGE);
        pages.map_while(move |(i, page)| {
            let first = position.max(i * PAGE);
            let len = ((i + 1) * PAGE - first).min((position + rows.len()).saturating_sub(first));
            let start = rows.start + first - position;
            let of = PageRows { page: *page, at: first - i * PAGE, rows: start..start + len };
            (len > 0).then_some(of)
        })
    }

    fn extend(
        &mut self,
        layer: usize,
        segment: &Segment,
        (k, v): (&Tensor, &Tensor),
    ) -> Result<()> {
        let new = |x: &Tensor| x.narrow(0, segment.start, segment.len)?.contiguous();
        let (k, v) = (new(k)?, new(v)?);
        match self.tensors.get_mut(layer) {
            None => self.tensors.push((k, v)),
            Some(kept) => {
                *kept = (Tensor::cat(&[&kept.0, &k], 0)?, Tensor::cat(&[&kept.1, &v], 0)?);
            }
        }
        Ok(())
    }
}
