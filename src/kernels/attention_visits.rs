//! The order in which attention over cached keys and values goes through pages, and what it fetches ahead.

use std::ops::Range;

use super::attention::AttentionShape;
use super::attention_cached::{CachedSegment, LayerPages};
use super::attention_forward::BLOCK_ROWS;
use super::attention_tile::{padded, whole_vectors, within_tile};
use super::pages::PAGE;
use super::prefetch::{LINE, Lines};

/// Visits between a page that is multiplied and one that is fetched, at most: their keys and values of a head lie in
/// the second-level cache meanwhile.
const MOST_AHEAD: usize = 4;

/// One new token.
#[derive(Clone, Copy)]
pub(super) struct Query<'a> {
    pub row: usize,
    pub position: usize,
    pub pages: &'a [u32],
}

impl Query<'_> {
    /// Where its heads that read key head `head` lie.
    pub fn source(&self, head: usize, shape: &AttentionShape) -> Range<usize> {
        let width = shape.group() * shape.head_dim;
        let at = (self.row * shape.kv_heads + head) * width;
        at..at + width
    }
}

/// Neighbouring queries that share their first page, and the pages that they read.
pub(super) struct Group {
    pub queries: Range<usize>,
    pub visits: Vec<Visit>,
}

/// A page that rows of a group read; rows are (query, head), heads fastest.
pub(super) struct Visit {
    pub number: u32,
    /// Position of its first key.
    pub tile: usize,
    pub rows: Range<usize>,
    /// What any of the rows sees of it.
    pub seen: Range<usize>,
}

/// All work of a layer: each task is a group and a key head.
pub(super) struct Plan<'a> {
    pub queries: Vec<Query<'a>>,
    pub groups: Vec<Group>,
    /// Group and head.
    pub tasks: Vec<(usize, usize)>,
    pub layer: LayerPages<'a>,
    pub shape: &'a AttentionShape,
}

impl<'a> Plan<'a> {
    pub fn new(
        segments: &[CachedSegment<'a>],
        layer: LayerPages<'a>,
        shape: &'a AttentionShape,
    ) -> Self {
        let (queries, groups) = (queries(segments), Vec::new());
        let mut plan = Self { queries, groups, tasks: Vec::new(), layer, shape };
        let most = (BLOCK_ROWS / shape.group()).max(1);
        let mut start = 0;
        for end in 1..=plan.queries.len() {
            let first = plan.queries[start].pages[0];
            let goes_on = plan.queries.get(end).is_some_and(|query| query.pages[0] == first);
            if !goes_on || end - start == most {
                let visits = plan.visits(start..end);
                plan.tasks.extend((0..shape.kv_heads).map(|head| (plan.groups.len(), head)));
                plan.groups.push(Group { queries: start..end, visits });
                start = end;
            }
        }
        plan
    }

    /// Rows of the largest group.
    pub fn most_rows(&self) -> usize {
        let of = |group: &Group| group.queries.len() * self.shape.group();
        self.groups.iter().map(of).max().unwrap_or(0)
    }

    /// The pages in ascending order, each with the neighbouring queries that read it.
    fn visits(&self, queries: Range<usize>) -> Vec<Visit> {
        let (queries, shape) = (&self.queries[queries], self.shape);
        let first = queries.iter().map(|query| shape.visible(query.position).start).min();
        let last = queries.iter().map(|query| query.position).max().unwrap_or(0);
        let pages = first.unwrap_or(0) / PAGE..last / PAGE + 1;
        let mut visits = Vec::with_capacity(queries.len() + pages.len());
        for page in pages {
            let mut rest = 0..queries.len();
            while let Some(number) = queries[rest.clone()].first().map(|q| q.pages.get(page)) {
                let same = queries[rest.clone()].iter().take_while(|q| q.pages.get(page) == number);
                let of = rest.start..rest.start + same.count();
                rest.start = of.end;
                let rows = of.start * shape.group()..of.end * shape.group();
                let tile = page * PAGE;
                let seen = seen(queries, shape, &rows, tile);
                if let (Some(&number), Some(seen)) = (number, seen) {
                    visits.push(Visit { number, tile, rows, seen });
                }
            }
        }
        visits
    }

    fn visits_of(&self, task: usize) -> &[Visit] {
        &self.groups[self.tasks[task].0].visits
    }

    /// What is read next.
    fn after(&self, place: Place) -> Option<Place> {
        let Place { task, visit, values } = place;
        if !values {
            return Some(Place { values: true, ..place });
        }
        let (task, visit) = match visit + 1 < self.visits_of(task).len() {
            true => (task, visit + 1),
            false => (task + 1, 0),
        };
        (task < self.tasks.len()).then_some(Place { task, visit, values: false })
    }

    /// Visits from one place to a later one of the same task or the next.
    fn distance(&self, from: Place, to: Place) -> usize {
        let before = if to.task == from.task { 0 } else { self.visits_of(from.task).len() };
        before + to.visit - from.visit
    }

    /// Where the keys or values at a place lie.
    fn lines(&self, place: Place) -> Lines {
        let LayerPages { pages, shape: parts, layer } = self.layer;
        let (Visit { number, seen, .. }, head) =
            (&self.visits_of(place.task)[place.visit], self.tasks[place.task].1);
        let (start, rows, row) = match place.values {
            false => (parts.keys(layer, head).start, whole_vectors(seen), parts.key_len()),
            true => (parts.values(layer, head).start, seen.clone(), padded(parts.head_dim)),
        };
        let bytes = parts.dtype.bytes();
        let at = pages[*number as usize].address() + (start + rows.start * row) * bytes;
        Lines::new(at, (rows.len() * row * bytes).div_ceil(LINE))
    }
}

fn queries<'a>(segments: &[CachedSegment<'a>]) -> Vec<Query<'a>> {
    let of = |segment: &CachedSegment<'a>| {
        let CachedSegment { start, len, position0, pages } = *segment;
        assert!(pages.len() * PAGE >= position0 + len, "a page is missing");
        (0..len).map(move |i| Query { row: start + i, position: position0 + i, pages })
    };
    segments.iter().flat_map(of).collect()
}

/// The positions that a row of some queries sees of the page whose keys begin at position `tile`.
pub(super) fn visible(
    queries: &[Query],
    shape: &AttentionShape,
    row: usize,
    tile: usize,
) -> Range<usize> {
    within_tile(&shape.visible(queries[row / shape.group()].position), tile)
}

/// The positions that any of some rows sees.
pub(super) fn seen(
    queries: &[Query],
    shape: &AttentionShape,
    rows: &Range<usize>,
    tile: usize,
) -> Option<Range<usize>> {
    let visible = |row| visible(queries, shape, row, tile);
    let seen = rows.clone().map(visible).filter(|seen| !seen.is_empty());
    seen.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end))
}

/// The keys or the values of a visit of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub task: usize,
    pub visit: usize,
    pub values: bool,
}

/// What a thread fetches while it multiplies: in the order in which it is read, across tasks, so that memory is
/// busy while the pages that many rows share are multiplied, too.
pub(super) struct Ahead {
    place: Place,
    lines: Lines,
}

impl Ahead {
    pub fn new() -> Self {
        Self { place: Place { task: 0, visit: 0, values: false }, lines: Lines::none() }
    }

    /// The lines to fetch while the product at a place is computed.
    pub fn lines(&mut self, plan: &Plan, now: Place) -> &mut Lines {
        let behind = self.place <= now || self.place.task > now.task + 1;
        if behind || !self.lines.are_left() {
            let next = plan.after(if behind { now } else { self.place });
            if let Some(next) = next
                .filter(|next| next.task <= now.task + 1 && plan.distance(now, *next) <= MOST_AHEAD)
            {
                (self.place, self.lines) = (next, plan.lines(next));
            }
        }
        &mut self.lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::pages::{Page, PageDtype, PageShape};

    const SHAPE: AttentionShape = AttentionShape {
        heads: 2,
        kv_heads: 2,
        head_dim: 16,
        scale: 1.0,
        window: None,
        softcap: None,
        rounded: false,
    };

    /// Three samples of a prompt of a page, each with half a page of its own.
    fn with_plan(check: impl Fn(&Plan, &[Page])) {
        let shape = PageShape { layers: 1, kv_heads: 2, head_dim: 16, dtype: PageDtype::F32 };
        let pages: Vec<Page> = (0..4).map(|_| Page::new(shape)).collect();
        let numbers = [[0, 1], [0, 2], [0, 3]];
        let segment = |start: usize| CachedSegment {
            start,
            len: 1,
            position0: PAGE + PAGE / 2 - 1,
            pages: &numbers[start],
        };
        let segments: Vec<_> = (0..3).map(segment).collect();
        let layer = LayerPages { pages: &pages, shape, layer: 0 };
        check(&Plan::new(&segments, layer, &SHAPE), &pages);
    }

    /// Where the values of a head begin.
    fn address(page: &Page, shape: &PageShape, head: usize) -> usize {
        page.address() + shape.values(0, head).start * size_of::<f32>()
    }

    #[test]
    fn samples_share_the_pages_of_their_prompt() {
        with_plan(|plan, _| {
            let visits: Vec<_> =
                plan.visits_of(1).iter().map(|v| (v.number, v.rows.clone())).collect();
            assert_eq!(visits, [(0, 0..3), (1, 0..1), (2, 1..2), (3, 2..3)]);
            assert_eq!((plan.tasks.len(), plan.most_rows()), (2, 3));
        });
    }

    #[test]
    fn what_is_fetched_is_what_is_read_next_up_to_the_next_task() {
        with_plan(|plan, pages| {
            let place = |task, visit, values| Place { task, visit, values };
            let mut ahead = Ahead::new();
            let mut fetched = Vec::new();
            for visit in 0..4 {
                for values in [false, true] {
                    let now = place(0, visit, values);
                    let lines = ahead.lines(plan, now);
                    let had = lines.are_left();
                    (0..100).for_each(|_| lines.some::<4>());
                    fetched.extend(had.then_some(ahead.place));
                    assert!(ahead.place > now && plan.distance(now, ahead.place) <= MOST_AHEAD);
                }
            }
            let rest = (1..4).flat_map(|visit| [place(0, visit, false), place(0, visit, true)]);
            let next = [place(1, 0, false)];
            assert_eq!(
                fetched,
                [place(0, 0, true)].into_iter().chain(rest).chain(next).collect::<Vec<_>>()
            );
            // half of the page is seen, of each head's values another part
            let lines = |head, visit| plan.lines(place(head, visit, true));
            let half =
                Lines::new(address(&pages[1], &plan.layer.shape, 0), PAGE / 2 * 16 * 4 / LINE);
            assert_eq!(lines(0, 1), half);
            let whole = Lines::new(address(&pages[0], &plan.layer.shape, 1), PAGE * 16 * 4 / LINE);
            assert_eq!(lines(1, 0), whole);
        });
    }
}
