//! Where adapters hook into the forward pass.

use std::fmt;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::{Batch, Matrix};
use crate::Result;
use crate::ops::{LowRankUpdate, Tape, Value};

/// A place in a block whose tensor is shifted (`model/block.rs` has the graph).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Site {
    /// The residual stream after the second addition.
    #[default]
    PostBlock,
    /// The MLP's contribution before it is added.
    PostMlp,
    /// The normed input of the MLP; the skip path is untouched.
    PreMlp,
    /// The attention's contribution before it is added.
    PostAttention,
}

impl Site {
    /// All sites.
    pub const ALL: [Site; 4] = [Site::PostBlock, Site::PostMlp, Site::PreMlp, Site::PostAttention];
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Site::PostBlock => "post_block",
            Site::PostMlp => "post_mlp",
            Site::PreMlp => "pre_mlp",
            Site::PostAttention => "post_attention",
        })
    }
}

/// What is added to a frozen policy, as its forward pass sees it.
pub trait Hooks {
    /// The lowest layer that it touches; none if it touches no layer.
    fn lowest_layer(&self) -> Option<usize>;

    /// Shifts h [N, D] at a site of a layer.
    fn shift(
        &self,
        _tape: &Tape,
        _layer: usize,
        _site: Site,
        h: Value,
        _batch: &Batch,
    ) -> Result<Value> {
        Ok(h)
    }

    /// Whether [`Hooks::shift`] does anything at a site of a layer.
    fn steers(&self, layer: usize, site: Site) -> bool;

    /// What is added to the output of a matrix whose input is x [N, in].
    fn update(
        &self,
        _tape: &Tape,
        _layer: usize,
        _matrix: Matrix,
        _x: &Value,
        _batch: &Batch,
    ) -> Result<Option<LowRankUpdate>> {
        Ok(None)
    }

    /// Whether all that it does in a block comes after the block's matrices, which then go without
    /// gradients in the lowest block.
    fn acts_last(&self) -> bool {
        false
    }
}
