//! Where products are cut into tasks for the threads.

use std::ops::Range;

use super::lanes::LANES;
use super::matmul::MAX_PANELS;
use super::parallel::{part, shrinking};

/// Rows of a task at most: one block of k of them lies in the second-level cache.
const ROW_BLOCK: usize = 256;

/// Cuts a product into tasks, each some rows and some panels: about `tasks` of them. Panels alone are
/// cut into parts that become smaller, so that the threads end together; rows are cut at multiples of
/// `unit`.
pub(crate) fn cut(
    (rows, unit): (usize, usize),
    panels: usize,
    tasks: usize,
) -> Vec<(Range<usize>, Range<usize>)> {
    let (row_parts, panel_parts) = grid(rows, panels, tasks);
    if (row_parts, tasks > 1) == (1, true) {
        let groups = shrinking(panels.div_ceil(MAX_PANELS), rayon::current_num_threads());
        let edge = |group: usize| (group * MAX_PANELS).min(panels);
        let panels = |groups: Range<usize>| edge(groups.start)..edge(groups.end);
        return groups.into_iter().map(|groups| (0..rows, panels(groups))).collect();
    }
    let row_parts = (0..row_parts).map(|i| part(rows, unit, row_parts, i));
    let panels = |i| part(panels, MAX_PANELS, panel_parts, i);
    row_parts.flat_map(|rows| (0..panel_parts).map(move |i| (rows.clone(), panels(i)))).collect()
}

/// Cuts rows and panels into about `tasks` parts such that the least is read twice: each part of
/// the rows reads its panels again, each part of the panels its rows.
fn grid(rows: usize, panels: usize, tasks: usize) -> (usize, usize) {
    let least = rows.div_ceil(ROW_BLOCK);
    let grids = (least..=least.max(tasks)).map(|r| (r, tasks.div_ceil(r).min(panels)));
    let read_again = |&(r, p): &(usize, usize)| r * panels * LANES + p * rows;
    grids.filter(|(r, p)| r * p >= tasks).min_by_key(read_again).unwrap_or((least, 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grid_gives_every_thread_work_and_cuts_where_it_is_cheap() {
        assert_eq!(grid(1, 96, 4), (1, 4));
        assert_eq!(grid(2048, 36, 4), (8, 1));
        assert_eq!(grid(300, 1, 16), (16, 1));
        assert_eq!(grid(170, 36, 32), (3, 11));
    }
}
