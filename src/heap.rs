//! The heap of the programs.
//!
//! The system's heap hands out blocks at multiples of 16 bytes. In three of four such places every vector of
//! 64 bytes lies across two cache lines: a GRPO step of SmolLM2 took 2 % longer. A program asks for this
//! heap by
//!
//! ```
//! #[global_allocator]
//! static HEAP: steersman::heap::Heap = steersman::heap::Heap;
//! ```

use std::alloc::{GlobalAlloc, Layout, System};

/// Bytes of a cache line, and of the widest vectors.
const LINE: usize = 64;
/// The least block, in bytes, that starts with a cache line.
const LARGE: usize = 1024;
/// What the system's heap aligns to by itself.
const MIN_ALIGN: usize = 16;

/// The system's heap, its large blocks at the start of a cache line.
///
/// The system is asked for a line more, and the byte before the block says how far into it the block
/// starts. Blocks that are asked for by alignment would not be taken again for others of their size.
pub struct Heap;

/// What the system is asked for in place of a large block.
fn with_a_line(layout: Layout) -> Option<Layout> {
    let large = layout.size() >= LARGE && layout.align() <= MIN_ALIGN;
    let more = large.then(|| layout.size().checked_add(LINE)).flatten()?;
    Layout::from_size_align(more, MIN_ALIGN).ok()
}

/// The first line start after `block`.
///
/// # Safety
/// `block` is null or the start of a block with a line more than is used.
unsafe fn line_start(block: *mut u8) -> *mut u8 {
    if block.is_null() {
        return block;
    }
    let offset = LINE - block.addr() % LINE;
    // SAFETY: the offset is 1 to 64, inside the block, and so is the byte before.
    unsafe {
        let start = block.add(offset);
        *start.sub(1) = offset as u8;
        start
    }
}

// SAFETY: blocks are the system's; a large one is cut at its front, by as much as it was made longer,
// and is given back from where it began.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe {
            match with_a_line(layout) {
                Some(longer) => line_start(System.alloc(longer)),
                None => System.alloc(layout),
            }
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe {
            match with_a_line(layout) {
                Some(longer) => line_start(System.alloc_zeroed(longer)),
                None => System.alloc_zeroed(layout),
            }
        }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise; the byte before a large block is `line_start`'s.
        unsafe {
            match with_a_line(layout) {
                Some(longer) => System.dealloc(block.sub(usize::from(*block.sub(1))), longer),
                None => System.dealloc(block, layout),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_blocks_start_with_a_line_and_keep_what_is_written() {
        for size in [1, LARGE - 1, LARGE, LARGE + 1, 5000, 1 << 20] {
            for align in [1, 4, MIN_ALIGN, LINE, 4096] {
                let layout = Layout::from_size_align(size, align).unwrap();
                // SAFETY: blocks are used as they were asked for.
                unsafe {
                    let (zeros, block) = (Heap.alloc_zeroed(layout), Heap.alloc(layout));
                    block.write_bytes(7, size);
                    for block in [zeros, block] {
                        let line = if size >= LARGE { LINE.max(align) } else { align };
                        assert!(block.addr().is_multiple_of(line), "{size} {align}");
                    }
                    let all =
                        |block, x| std::slice::from_raw_parts(block, size).iter().all(|b| *b == x);
                    assert!(all(zeros, 0) && all(block, 7));
                    let block = Heap.realloc(block, layout, 2 * size);
                    assert!(all(block, 7));
                    Heap.dealloc(block, Layout::from_size_align(2 * size, align).unwrap());
                    Heap.dealloc(zeros, layout);
                }
            }
        }
    }
}
