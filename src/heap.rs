//! The heap of the programs.
//!
//! The system's heap hands out blocks at multiples of 16 bytes. In three of four such places every vector of
//! 64 bytes lies across two cache lines: a GRPO step of SmolLM2 took 2 % longer. And it looks long for a block
//! among those of other sizes, while the passes of a model ask for the same sizes again and again: the same step
//! spent 2.5 % of its time so. Here large blocks start with a line, and those that are given back are kept for
//! the next of their size. A program asks for this heap by
//!
//! ```
//! #[global_allocator]
//! static HEAP: steersman::heap::Heap = steersman::heap::Heap;
//! ```

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, Ordering};

/// Bytes of a cache line, and of the widest vectors.
const LINE: usize = 64;
/// The least block, in bytes, that starts with a cache line.
const LARGE: usize = 1024;
/// What the system's heap aligns to by itself.
const MIN_ALIGN: usize = 16;
/// The largest block that is kept.
const LARGEST: usize = 1 << 20;
/// Bytes of all blocks that are kept, at most.
pub const MOST_BYTES: usize = 16 << 20;
/// Sizes whose blocks are kept, and blocks of one.
const SHELVES: usize = 128;
const SHELF: usize = 8;
/// Shelves on which blocks of a size may lie.
const WAYS: usize = 4;

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

/// Gives a large block back to the system, from where it began there.
///
/// # Safety
/// [`line_start`] gave the block, of this size.
unsafe fn give_back(block: *mut u8, size: usize) {
    // SAFETY: the byte before the block says how far it was moved; the layout is the one it was asked for by.
    unsafe {
        let longer = Layout::from_size_align_unchecked(size + LINE, MIN_ALIGN);
        System.dealloc(block.sub(usize::from(*block.sub(1))), longer);
    }
}

/// Blocks of one size.
#[derive(Clone, Copy)]
struct Shelf {
    size: usize,
    count: usize,
    blocks: [*mut u8; SHELF],
}

/// Large blocks that were given back.
struct Kept {
    shelves: [Shelf; SHELVES],
    bytes: usize,
    /// The shelf that is cleared next where there is no room.
    oldest: usize,
}

impl Kept {
    const NONE: Self = {
        let empty = Shelf { size: 0, count: 0, blocks: [std::ptr::null_mut(); SHELF] };
        Self { shelves: [empty; SHELVES], bytes: 0, oldest: 0 }
    };

    /// The shelves on which blocks of a size may lie.
    fn shelves_of(size: usize) -> [usize; WAYS] {
        let first = (size as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 57;
        std::array::from_fn(|i| (first as usize + i) % SHELVES)
    }

    /// A block of this size, if there is one.
    fn take(&mut self, size: usize) -> Option<*mut u8> {
        let shelves = Self::shelves_of(size).into_iter();
        let at = shelves.into_iter().find(|i| self.shelves[*i].size == size)?;
        let shelf = &mut self.shelves[at];
        shelf.count = shelf.count.checked_sub(1)?;
        self.bytes -= size;
        Some(shelf.blocks[shelf.count])
    }

    /// Keeps a block.
    ///
    /// # Safety
    /// [`line_start`] gave it, of this size, and nobody uses it.
    unsafe fn put(&mut self, block: *mut u8, size: usize) {
        let all = Self::shelves_of(size);
        let find =
            |found: &dyn Fn(&Shelf) -> bool| all.iter().copied().find(|i| found(&self.shelves[*i]));
        let own = find(&|shelf| shelf.size == size);
        let at = own.or_else(|| find(&|shelf| shelf.count == 0)).unwrap_or(all[0]);
        if self.shelves[at].size != size {
            self.clear(at);
            self.shelves[at].size = size;
        }
        if self.shelves[at].count == SHELF {
            // SAFETY: the caller's promise.
            return unsafe { give_back(block, size) };
        }
        while self.bytes + size > MOST_BYTES {
            self.clear(self.oldest);
            self.oldest = (self.oldest + 1) % SHELVES;
        }
        let shelf = &mut self.shelves[at];
        shelf.blocks[shelf.count] = block;
        shelf.count += 1;
        self.bytes += size;
    }

    /// Gives the blocks of a shelf back to the system.
    fn clear(&mut self, at: usize) {
        let shelf = &mut self.shelves[at];
        for block in &shelf.blocks[..shelf.count] {
            // SAFETY: `put` was promised that the block is one of this size.
            unsafe { give_back(*block, shelf.size) };
        }
        self.bytes -= shelf.count * shelf.size;
        shelf.count = 0;
    }
}

/// What one thread at a time may look into; the others ask the system meanwhile.
struct Shared {
    busy: AtomicBool,
    kept: UnsafeCell<Kept>,
}

// SAFETY: only the thread that has set `busy` looks into it.
unsafe impl Sync for Shared {}

static SHARED: Shared = Shared { busy: AtomicBool::new(false), kept: UnsafeCell::new(Kept::NONE) };

/// Does `work`, which does not panic, with the blocks that are kept, unless a block of this size is none to be
/// kept or another thread is at them.
fn with_kept<R>(size: usize, work: impl FnOnce(&mut Kept) -> R) -> Option<R> {
    if size > LARGEST || SHARED.busy.swap(true, Ordering::Acquire) {
        return None;
    }
    // SAFETY: `busy` was not set before.
    let result = work(unsafe { &mut *SHARED.kept.get() });
    SHARED.busy.store(false, Ordering::Release);
    Some(result)
}

// SAFETY: blocks are the system's; a large one is cut at its front, by as much as it was made longer, is kept
// only while nobody uses it, and is given back from where it began.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let Some(longer) = with_a_line(layout) else {
            // SAFETY: the caller's promise.
            return unsafe { System.alloc(layout) };
        };
        let kept = with_kept(layout.size(), |kept| kept.take(layout.size())).flatten();
        // SAFETY: the caller's promise.
        kept.unwrap_or_else(|| unsafe { line_start(System.alloc(longer)) })
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let Some(longer) = with_a_line(layout) else {
            // SAFETY: the caller's promise.
            return unsafe { System.alloc_zeroed(layout) };
        };
        let kept = with_kept(layout.size(), |kept| kept.take(layout.size())).flatten();
        // SAFETY: the caller's promise; a block that was kept has this size.
        unsafe {
            match kept {
                Some(block) => {
                    block.write_bytes(0, layout.size());
                    block
                }
                None => line_start(System.alloc_zeroed(longer)),
            }
        }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if with_a_line(layout).is_none() {
            // SAFETY: the caller's promise.
            return unsafe { System.dealloc(block, layout) };
        }
        let size = layout.size();
        // SAFETY: the caller's promise: the block is of this size, and so `line_start` gave it.
        unsafe {
            if with_kept(size, |kept| kept.put(block, size)).is_none() {
                give_back(block, size);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_given_out_again_to_one_who_asks_for_its_size() {
        let layout = |size| Layout::from_size_align(size, 4).unwrap();
        let mut kept = Kept::NONE;
        // SAFETY: blocks are used as they were asked for.
        unsafe {
            let blocks: Vec<_> = (0..SHELF + 2).map(|_| Heap.alloc(layout(5000))).collect();
            blocks.iter().for_each(|block| kept.put(*block, 5000));
            assert_eq!((kept.bytes, kept.take(5001)), (SHELF * 5000, None));
            let again: Vec<_> = std::iter::from_fn(|| kept.take(5000)).collect();
            assert!(again.iter().eq(blocks[..SHELF].iter().rev()) && kept.bytes == 0);
            again.into_iter().for_each(|block| give_back(block, 5000));
        }
    }

    #[test]
    fn no_more_is_kept_than_there_is_room_for_whatever_sizes_come() {
        let mut kept = Kept::NONE;
        for i in 0..2000usize {
            let size = LARGE + i * 7919 % (LARGEST - LARGE);
            // SAFETY: blocks are used as they were asked for.
            unsafe { kept.put(Heap.alloc(Layout::from_size_align(size, 4).unwrap()), size) };
            let held: usize = kept.shelves.iter().map(|shelf| shelf.count * shelf.size).sum();
            assert!(held == kept.bytes && (size..=MOST_BYTES).contains(&held), "{held}");
        }
        (0..SHELVES).for_each(|at| kept.clear(at));
        assert_eq!(kept.bytes, 0);
    }

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
