//! What defenses share, for authors of defenses anywhere.
//!
//! | file | what it holds |
//! |---|---|
//! | [`kept`] | parameters that are kept from the start of a stage, and the pull back to them |
//! | [`mod@dot`] | the inner product of gradients |
//! | [`likelihood`] | log-probabilities for losses of a defense's own |
//! | [`settings`] | settings that several defenses have, and checks of their ranges |

pub mod dot;
pub mod kept;
pub mod likelihood;
pub mod settings;

pub use dot::dot;
pub use kept::{Kept, pull};
pub use likelihood::{label_log_probabilities, label_rows, log_softmax, wide};
pub use settings::{MicroBatches, Reduction, check_fraction, check_strength};
