//! Sliding windows of the families that have them in some blocks: Qwen2, Qwen3 and Gemma from the second on.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use titer_core::{Error, Result};

/// How far a block looks back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LayerType {
    /// To the first token.
    FullAttention,
    /// As far as `sliding_window` says.
    SlidingAttention,
}

/// Which blocks slide.
#[derive(Debug, Clone, Copy)]
pub(super) enum SlidingPattern {
    /// All from this one on.
    From(usize),
    /// All but every so many.
    AllButEvery(usize),
}

/// What a `config.json` says about the windows of its blocks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Windows<'a> {
    /// How many positions back a token sees in the blocks that slide, its own included; `None` if no block slides.
    pub size: Option<usize>,
    /// Which blocks have it, unless `types` says it block by block.
    pub pattern: SlidingPattern,
    /// The attention of each block.
    pub types: Option<&'a [LayerType]>,
    /// How many blocks there are.
    pub blocks: usize,
}

impl Windows<'_> {
    /// Fails if `layer_types` does not fit the other keys.
    pub(super) fn check(self) -> Result<()> {
        let Some(types) = self.types else { return Ok(()) };
        let refuse = |message: String| Error::config(message).key("layer_types");
        if types.len() != self.blocks {
            let message = format!("{} `layer_types` for {} blocks", types.len(), self.blocks);
            return Err(refuse(message).help("give one for each block"));
        }
        if types.contains(&LayerType::SlidingAttention) && self.size.is_none() {
            let message = "a block of `sliding_attention` has no window".to_owned();
            return Err(refuse(message).help("set `sliding_window`, and `use_sliding_window` to true"));
        }
        Ok(())
    }

    /// The window of block `index`; `None` if it looks back to the first token.
    pub(super) fn of_block(self, index: usize) -> Option<usize> {
        let slides = match self.types {
            Some(types) => types.get(index) == Some(&LayerType::SlidingAttention),
            None => match self.pattern {
                SlidingPattern::From(first) => index >= first,
                SlidingPattern::AllButEvery(count) => !(index + 1).is_multiple_of(count),
            },
        };
        self.size.filter(|_| slides)
    }
}
