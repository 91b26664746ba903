//! Memory of cached keys and values: pages that several sequences may hold.

use crate::kernels::pages::{Page, PageShape};

/// Pages by number, with the count of their holders; given-up pages are used again, so that memory
/// is asked for only while the cache grows.
#[derive(Debug, Default)]
pub(super) struct PagePool {
    pages: Vec<Page>,
    holders: Vec<u32>,
    free: Vec<u32>,
}

impl PagePool {
    /// All pages by number.
    pub(super) fn pages(&self) -> &[Page] {
        &self.pages
    }

    /// All pages by number, to write to those that have one holder.
    pub(super) fn pages_mut(&mut self) -> &mut [Page] {
        &mut self.pages
    }

    /// A page with one holder, its contents arbitrary.
    pub(super) fn take(&mut self, shape: PageShape) -> u32 {
        if let Some(page) = self.free.pop() {
            self.holders[page as usize] = 1;
            return page;
        }
        self.pages.push(Page::new(shape));
        self.holders.push(1);
        self.pages.len() as u32 - 1
    }

    /// Adds a holder.
    pub(super) fn hold(&mut self, page: u32) {
        self.holders[page as usize] += 1;
    }

    /// Takes a holder away; a page without one is free.
    pub(super) fn give_up(&mut self, page: u32) {
        let holders = &mut self.holders[page as usize];
        *holders -= 1;
        if *holders == 0 {
            self.free.push(page);
        }
    }

    /// The same page if it has one holder, else a copy of it for this holder alone.
    pub(super) fn own(&mut self, page: u32, shape: PageShape) -> u32 {
        if self.holders[page as usize] == 1 {
            return page;
        }
        let copy = self.take(shape);
        let [from, to] = [page, copy].map(|page| page as usize);
        if let Ok([from, to]) = self.pages.get_disjoint_mut([from, to]) {
            to.copy_from(from);
        }
        self.give_up(page);
        copy
    }

    /// Pages that somebody holds.
    pub(super) fn held(&self) -> usize {
        self.pages.len() - self.free.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::pages::PageDtype;

    const SHAPE: PageShape =
        PageShape { layers: 1, kv_heads: 1, head_dim: 1, dtype: PageDtype::F32 };

    #[test]
    fn a_shared_page_is_copied_before_it_is_written_and_freed_with_its_last_holder() {
        let mut pool = PagePool::default();
        let page = pool.take(SHAPE);
        let full = Page::F32(vec![7.0; SHAPE.len()].into());
        pool.pages_mut()[page as usize] = full.clone();
        assert_eq!(pool.own(page, SHAPE), page);
        pool.hold(page);
        let copy = pool.own(page, SHAPE);
        assert!(copy != page && pool.pages()[copy as usize] == full);
        assert_eq!(pool.own(page, SHAPE), page);
        pool.give_up(page);
        assert_eq!(pool.held(), 1);
        assert_eq!(pool.take(SHAPE), page);
        assert_eq!(pool.pages().len(), 2);
    }
}
