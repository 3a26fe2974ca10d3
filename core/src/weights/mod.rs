//! Parameters by name: what a model declares, how they are stored, training them in full or through LoRA.
//!
//! | file | what it holds |
//! |---|---|
//! | [`schema`] | declared parameters: name, shape, initialisation, role, block |
//! | [`precision`] | how a base is stored: f32, half precision, quantized |
//! | [`parameters`] | the numbers: views, snapshots, changes in place |
//! | [`lora`] `adapters` | low-rank adapters; attaching, merging and dropping them |
//! | [`peft`] | adapter folders as PEFT keeps them |
//! | `load` [`checkpoint`] | from a seed or a file and back; safetensors files |

mod adapters;
pub mod checkpoint;
mod load;
pub mod lora;
pub mod parameters;
pub mod peft;
pub mod precision;
pub mod schema;

pub use checkpoint::Checkpoint;
pub use lora::{Adapter, LoraConfig};
pub use parameters::Weights;
pub use precision::Precision;
pub use schema::{HEAD, Init, Param, ParamId, ParamList, Role, factor_names, module_of};
