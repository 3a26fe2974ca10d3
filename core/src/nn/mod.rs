//! What models are built of, and what travels along with a forward pass.

pub mod cache;
pub mod forward;
pub(crate) mod input_squares;
pub mod layers;
pub mod sites;
pub mod spec;

pub use cache::Cache;
pub use forward::Forward;
pub use sites::Sites;
pub use spec::ModelSpec;
