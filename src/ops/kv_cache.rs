//! Keys and values of sequences that are being generated.

use candle_core::Tensor;

use super::engine::{Engine, host};
use crate::Result;
use crate::kernels::attention::{KeySpan, Segment};

/// Names one sequence (or shared prefix) of a [`KvCache`].
pub type SlotId = usize;

/// Keys and values per layer and sequence; a sequence may continue another one, its parent.
///
/// A group of samples shares one prompt that way: the prompt is a slot, each sample a child of it.
#[derive(Debug, Default)]
pub struct KvCache {
    layers: usize,
    slots: Vec<Option<Slot>>,
}

#[derive(Debug)]
struct Slot {
    parent: Option<SlotId>,
    children: usize,
    position0: usize,
    len: usize,
    rows: Vec<Rows>,
}

/// Keys and values of one layer, each `len` rows of kv_heads * head_dim.
#[derive(Debug)]
enum Rows {
    Host { k: Vec<f32>, v: Vec<f32> },
    Device { k: Option<Tensor>, v: Option<Tensor> },
}

impl KvCache {
    /// An empty cache for a model of `layers` layers.
    pub fn new(layers: usize) -> Self {
        KvCache { layers, slots: Vec::new() }
    }

    /// Opens a sequence that starts empty, or continues `parent` where that one stands now.
    pub fn open(&mut self, parent: Option<SlotId>) -> SlotId {
        let position0 = parent.map_or(0, |parent| self.len(parent));
        if let Some(parent) = parent.and_then(|parent| self.slots[parent].as_mut()) {
            parent.children += 1;
        }
        let slot = Slot { parent, children: 0, position0, len: 0, rows: Vec::new() };
        match self.slots.iter().position(Option::is_none) {
            Some(free) => {
                self.slots[free] = Some(slot);
                free
            }
            None => {
                self.slots.push(Some(slot));
                self.slots.len() - 1
            }
        }
    }

    /// Gives up a sequence; a parent's memory is freed with its last child.
    pub fn close(&mut self, id: SlotId) {
        let Some(slot) = self.slots[id].take() else { return };
        if slot.children > 0 {
            self.slots[id] = Some(slot);
            return;
        }
        if let Some(parent) = slot.parent {
            if let Some(parent) = self.slots[parent].as_mut() {
                parent.children -= 1;
            }
            if self.slots[parent].as_ref().is_some_and(|parent| parent.children == 0) {
                self.close(parent);
            }
        }
    }

    /// Tokens in the sequence, its ancestors' included: the position of its next token.
    pub fn len(&self, id: SlotId) -> usize {
        self.slots[id].as_ref().map_or(0, |slot| slot.position0 + slot.len)
    }

    /// Whether no sequence is open.
    pub fn is_empty(&self) -> bool {
        self.slots.iter().all(Option::is_none)
    }

    /// Appends each segment's rows of k and v [N, kv_heads * head_dim] to its slot.
    pub(super) fn append(
        &mut self,
        engine: &Engine,
        layer: usize,
        segments: &[Segment],
        slots: &[SlotId],
        (k, v): (&Tensor, &Tensor),
    ) -> Result<()> {
        let width = k.dims2()?.1;
        for (segment, id) in segments.iter().zip(slots) {
            let Some(slot) = self.slots[*id].as_mut() else { continue };
            if slot.rows.is_empty() {
                slot.rows = (0..self.layers).map(|_| Rows::new(engine)).collect();
            }
            slot.rows[layer].append(segment, width, k, v)?;
            if layer + 1 == self.layers {
                slot.len += segment.len;
            }
        }
        Ok(())
    }

    /// The runs of keys and values that slot `id` sees in `layer`, ancestors first.
    pub(super) fn spans(&self, id: SlotId, layer: usize, width: usize) -> Vec<KeySpan<'_>> {
        let chain = self.chain(id);
        let host_rows = chain.iter().filter_map(|slot| match slot.rows.get(layer) {
            Some(Rows::Host { k, v }) => Some((slot.position0, k, v)),
            _ => None,
        });
        host_rows
            .map(|(position0, k, v)| KeySpan { k, v, position0, len: k.len() / width })
            .collect()
    }

    /// Keys and values that slot `id` sees in `layer` as two tensors [keys, kv_heads * head_dim].
    pub(super) fn tensors(&self, id: SlotId, layer: usize) -> Result<(Tensor, Tensor)> {
        let (mut ks, mut vs) = (Vec::new(), Vec::new());
        for slot in self.chain(id) {
            if let Some(Rows::Device { k: Some(k), v: Some(v) }) = slot.rows.get(layer) {
                ks.push(k);
                vs.push(v);
            }
        }
        Ok((Tensor::cat(&ks, 0)?, Tensor::cat(&vs, 0)?))
    }

    fn chain(&self, id: SlotId) -> Vec<&Slot> {
        let mut chain = Vec::new();
        let mut next = Some(id);
        while let Some(slot) = next.and_then(|id| self.slots[id].as_ref()) {
            chain.push(slot);
            next = slot.parent;
        }
        chain.reverse();
        chain
    }
}

impl Rows {
    fn new(engine: &Engine) -> Self {
        match engine.fused() {
            true => Rows::Host { k: Vec::new(), v: Vec::new() },
            false => Rows::Device { k: None, v: None },
        }
    }

    fn append(&mut self, segment: &Segment, width: usize, k: &Tensor, v: &Tensor) -> Result<()> {
        let (start, len) = (segment.start, segment.len);
        match self {
            Rows::Host { k: keys, v: values } => {
                let rows = start * width..(start + len) * width;
                keys.extend_from_slice(&host(k)?[rows.clone()]);
                values.extend_from_slice(&host(v)?[rows]);
            }
            Rows::Device { k: keys, v: values } => {
                for (kept, new) in [(keys, k), (values, v)] {
                    let new = new.narrow(0, start, len)?;
                    *kept = Some(match kept.take() {
                        None => new.contiguous()?,
                        Some(before) => Tensor::cat(&[before, new], 0)?,
                    });
                }
            }
        }
        Ok(())
    }
}
