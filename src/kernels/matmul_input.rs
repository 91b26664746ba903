//! The input of a product in the form that the inner loop reads: where it lies, or copied.

use std::cell::Cell;
use std::marker::PhantomData;
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
/// Lines of a room that a thread keeps for its next copies, at most: 4 MiB.
const KEPT_LINES: usize = 1 << 16;

/// A cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

thread_local! {
    /// Where the last copies lay. Decoding makes them thousands of times among results that stay: as blocks of the
    /// heap, they would leave holes between those.
    static ROOM: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// Some rows of a span of k, one block of k after the other; without elements where they are read where they
/// lie.
pub(super) struct Input<A> {
    rows: Range<usize>,
    room: Vec<Line>,
    elements: usize,
    form: PhantomData<A>,
}

impl<A> Drop for Input<A> {
    fn drop(&mut self) {
        if (1..=KEPT_LINES).contains(&self.room.len()) {
            ROOM.set(std::mem::take(&mut self.room));
        }
    }
}

impl<A: Form> Input<A> {
    pub(super) const fn new() -> Self {
        const { assert!(align_of::<A>() <= align_of::<Line>()) };
        Input { rows: 0..0, room: Vec::new(), elements: 0, form: PhantomData }
    }

    /// Room for so many elements.
    fn make_room(&mut self, elements: usize) -> &mut [A] {
        let lines = (elements * size_of::<A>()).div_ceil(size_of::<Line>());
        if self.room.len() < lines && lines <= KEPT_LINES {
            self.room = ROOM.take();
        }
        if self.room.len() < lines {
            // SAFETY: every bit pattern is a line, and only what a copy has written is read.
            self.room = unsafe { room_of(lines) };
        }
        if cfg!(any(test, debug_assertions)) {
            self.room.fill(Line([0xff; 64]));
        }
        self.elements = elements;
        // SAFETY: there are so many bytes, aligned for lines; every bit pattern is an element.
        unsafe { std::slice::from_raw_parts_mut(self.room.as_mut_ptr().cast(), elements) }
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
        self.rows = rows.clone();
        let elements = self.make_room(rows.len() * (whole * A::row_elements(links) + rest));
        let blocks = elements.chunks_mut(rows.len() * A::row_elements(links));
        let parts = k.clone().step_by(links).zip(blocks).flat_map(|(k0, block)| {
            let width = links.min(k.end - k0);
            let parts = block.chunks_mut(COPY_ROWS * A::row_elements(width)).enumerate();
            parts.map(move |(i, into)| {
                ((rows.start + i * COPY_ROWS) * stride + k0 - job.links.start, width, into)
            })
        });
        let copy = |(start, width, into): (usize, usize, &mut [A])| {
            A::copy(job.level, &job.x[start..], stride, width, into);
        };
        match alone || rows.len() <= COPY_ROWS {
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
        if let (Some(x), true) = (A::in_place(job.x), self.elements == 0) {
            let stride = job.links.len();
            return (x[rows.start * stride + k0 - job.links.start..].as_ptr(), stride);
        }
        let links = A::block_links(job.k);
        let lda = A::row_elements(links.min(k.end - k0));
        let block = (k0 - k.start) / links * A::row_elements(links);
        let start = block * self.rows.len() + (rows.start - self.rows.start) * lda;
        let elements: *const A = self.room.as_ptr().cast();
        let inside = self.rows.start <= rows.start && rows.end <= self.rows.end;
        assert!(inside && start < self.elements, "rows that have not been copied");
        // SAFETY: it is one of the elements that the room has.
        (unsafe { elements.add(start) }, lda)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_copies_of_a_thread_lie_where_its_last_ones_did() {
        let mut input = Input::<f32>::new();
        let place = input.make_room(100).as_ptr();
        drop(input);
        let mut next = Input::<f32>::new();
        assert_eq!(next.make_room(90).as_ptr(), place);
        assert_ne!(Input::<f32>::new().make_room(90).as_ptr(), place, "used by two at once");
    }
}
