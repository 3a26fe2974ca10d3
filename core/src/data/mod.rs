//! Rows, examples, batches, seeded streams and mixtures.

pub mod batch;
pub mod example;
pub mod mixture;
pub mod row;
pub mod stream;

pub use batch::Batch;
pub use example::Example;
pub use mixture::{harmful_count, mixture};
pub use row::{Message, Row};
pub use stream::Stream;

pub use crate::tensor::tokens::Tokens;
