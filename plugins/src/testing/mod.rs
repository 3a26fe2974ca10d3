//! What the tests of plugins share: small models, batches, single steps, and checks that go through several settings.
//!
//! The laws that every defense and every model owes are in `titer_core::testing`.

mod checks;
mod lineage;
mod models;
mod steps;

pub use checks::{
    check_must_begin, check_neutral, check_passes, check_published, check_refused, check_slope, check_slopes, is_plain,
};
pub use lineage::{
    TrainedLineage, basis, bits, check_kept_beside_frozen, check_untouched, close, dense, finish, matrices, norm, post,
};
pub use models::{adapt, all_tiny, build, small, tiny, variants};
pub use steps::{
    batch, begin, context, data, defense, gap, log_softmax, logits, moved, plain, same, step, three_rows, update,
};
