//! A piece of the model in a candle expression of a defense.

use crate::nn::forward::BlockContext;
use crate::tensor::bridge::Piece;

/// A piece of the model whose results a defense holds, until a loss of them is differentiated.
#[derive(Debug)]
pub(super) struct OpenPass {
    pub(super) piece: Piece,
    pub(super) blocks: BlockContext,
}
