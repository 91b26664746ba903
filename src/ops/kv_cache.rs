//! Keys and values of sequences that are being generated.

use candle_core::Tensor;

use super::engine::{Engine, host};
use super::page_pool::PagePool;
use crate::kernels::attention::{AttentionShape, Segment};
use crate::kernels::attention_cached::{CachedSegment, LayerPages};
use crate::kernels::pages::{PAGE, PageDtype, PageRows, PageShape, write_rows};
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
            slot.place(segment, &mut rows);
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

    /// Says to which of the reserved pages a segment's rows go.
    fn place(&self, segment: &Segment, rows: &mut Vec<PageRows>) {
        let mut done = 0;
        while done < segment.len && !self.pages.is_empty() {
            let (at, start) = ((self.len + done) % PAGE, segment.start + done);
            let len = (PAGE - at).min(segment.len - done);
            let page = self.pages[(self.len + done) / PAGE];
            rows.push(PageRows { page, at, rows: start..start + len });
            done += len;
        }
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
