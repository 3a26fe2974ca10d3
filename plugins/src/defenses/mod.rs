//! Defenses, one file each.

pub mod alignment_update;
pub mod antidote;
pub mod asft;
pub mod booster;
pub mod constrained_sft;
pub mod ewc;
pub mod kl;
pub mod ldifs;
pub mod lisa;
pub mod lox;
pub mod none;
pub mod prompt_template;
pub mod random_perturbation;
pub mod repnoise;
pub mod resta;
pub mod safe_lora;
pub mod sft;
pub mod t_vaccine;
pub mod tar;
pub mod vaccine;
pub mod vlguard;
