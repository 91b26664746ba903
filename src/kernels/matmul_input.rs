//! The input of a product in the form that the inner loop reads: where it lies, or copied.

use std::ops::Range;

use super::matmul_form::Form;
use super::matmul_product::{Product, STREAM_ROWS};
use super::parallel::for_each;
use super::slices::room_of;

/// Rows that are a multiple of so many numbers apart begin in the same sets of a first-level cache and
/// drive each other out of it, so that copies are read instead.
const SAME_SETS: usize = 1024;
/// Rows that are copied at a time.
const COPY_ROWS: usize = 32;

/// Some rows of a span of k, one block of k after the other; without elements where they are read where they
/// lie.
pub(super) struct Input<A> {
    rows: Range<usize>,
    elements: Vec<A>,
}

impl<A: Form> Input<A> {
    pub(super) const fn new() -> Self {
        Input { rows: 0..0, elements: Vec::new() }
    }

    /// Whether the input of a product has to be copied: its form is another, or its rows are many and begin in
    /// the same sets.
    pub(super) fn is_copied(job: &Product) -> bool {
        let stride = job.links.len();
        let apart = !stride.is_multiple_of(SAME_SETS);
        A::in_place(job.x).is_none() || (job.rows > STREAM_ROWS && !apart)
    }

    /// Copies rows of a span of k, on this thread alone or on all.
    pub(super) fn copy(
        &mut self,
        job: &Product,
        rows: Range<usize>,
        k: &Range<usize>,
        alone: bool,
    ) {
        let (stride, links) = (job.links.len(), A::block_links(job.k));
        let (whole, rest) = (k.len() / links, A::row_elements(k.len() % links));
        let elements = rows.len() * (whole * A::row_elements(links) + rest);
        if self.elements.len() != elements {
            // SAFETY: every bit pattern is an element, and `A::copy` writes all that is read.
            self.elements = unsafe { room_of(elements) };
        }
        self.rows = rows;
        let first = self.rows.start;
        let blocks = self.elements.chunks_mut(self.rows.len() * A::row_elements(links));
        let parts = k.clone().step_by(links).zip(blocks).flat_map(|(k0, block)| {
            let width = links.min(k.end - k0);
            let parts = block.chunks_mut(COPY_ROWS * A::row_elements(width)).enumerate();
            parts.map(move |(i, into)| {
                ((first + i * COPY_ROWS) * stride + k0 - job.links.start, width, into)
            })
        });
        let copy = |(start, width, into): (usize, usize, &mut [A])| {
            A::copy(job.level, &job.x[start..], stride, width, into);
        };
        match alone || self.rows.len() <= COPY_ROWS {
            true => parts.for_each(copy),
            false => for_each(parts, copy),
        }
    }

    /// The first of some rows at link `k0` of the span `k`, where its block begins, and the elements from row to
    /// row.
    pub(super) fn at(
        &self,
        job: &Product,
        rows: &Range<usize>,
        k: &Range<usize>,
        k0: usize,
    ) -> (*const A, usize) {
        if let (Some(x), true) = (A::in_place(job.x), self.elements.is_empty()) {
            let stride = job.links.len();
            return (x[rows.start * stride + k0 - job.links.start..].as_ptr(), stride);
        }
        let links = A::block_links(job.k);
        let lda = A::row_elements(links.min(k.end - k0));
        let block = (k0 - k.start) / links * A::row_elements(links);
        let start = block * self.rows.len() + (rows.start - self.rows.start) * lda;
        (self.elements[start..].as_ptr(), lda)
    }
}
