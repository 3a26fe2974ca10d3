//! Tasks, one file each: the embedded world's, and files of real text.

pub mod agnews;
pub mod beavertails;
pub mod gsm8k;
pub mod prompt_sets;
pub mod rows;
pub mod sst2;
pub mod world_agnews;
pub mod world_benign;
pub mod world_gsm8k;
pub mod world_harmful;
pub mod world_safe;
pub mod world_sst2;
pub mod world_text;
