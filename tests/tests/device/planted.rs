//! Defects that are planted between the program and the device: each must be found by the test of what it breaks, or by the
//! stand-in's own checks.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use titer_tests::cli::stderr;

use crate::standin::alone;

/// What is planted (see `tests/standin`), and the test that must fail.
const DEFECTS: [(&str, &str); 24] = [
    // Arguments in another order.
    ("swap rms_norm_bwd_f32 1 2", "operators::rms_norms"),
    ("swap rms_norm_bwd_f32 4 5", "operators::rms_norms"),
    ("swap gated_bwd_bf16 3 4", "operators::gates"),
    ("swap rope_f32 4 5", "operators::rotations"),
    ("swap attention_dq_bf16 6 7", "attention::lengths"),
    // A buffer that is freed before the kernel runs.
    ("free rms_norm_bwd_f32 2", "operators::rms_norms"),
    ("free adamw_many 1", "models::adapters_in_f32"),
    // A count that is one too large.
    ("add gated_fwd_f32 3 1", "operators::gates"),
    ("add activation_bwd_bf16 3 1", "operators::activations"),
    // Fewer blocks, and larger ones, than the kernel asks for.
    ("grid layer_norm_fwd_f32 -1", "operators::layer_norms"),
    ("grid adapter_narrow_bf16 -1", "operators::adapters_of_several_layers"),
    ("grid adapter_widen_f32 -1", "operators::adapters_of_several_layers"),
    ("grid adapter_outer_f32 -1", "operators::adapters_of_several_layers"),
    ("block rms_norm_fwd_f32 512", "operators::rms_norms"),
    ("grid attention_dkdv_bf16 -1", "attention::lengths"),
    // A buffer that is too small.
    ("shrink sum_squares_many 1 4", "operators::arithmetic_without_gradients"),
    ("shrink attention_fwd_f32 5 4", "attention::lengths"),
    // Products that add to what nobody wrote.
    ("beta 1", "operators::products"),
    // Threads that do not wait for each other.
    ("barrier rms_norm_fwd_f32", "operators::rms_norms"),
    ("barrier adapter_narrow_f32", "operators::adapters_of_several_layers"),
    ("barrier cross_entropy_bf16", "operators::losses"),
    ("barrier attention_fwd_bf16", "attention::lengths"),
    ("barrier attention_dq_f32", "attention::lengths"),
    ("barrier attention_dkdv_bf16", "attention::lengths"),
];

#[test]
#[ignore = "needs the stand-in: see .ci/device"]
fn every_defect_is_found() -> Result<()> {
    for test in BTreeSet::from(DEFECTS.map(|(_, test)| test)) {
        let output = alone(test, &[])?;
        ensure!(output.status.success(), "{test} fails without a defect: {}", stderr(&output));
    }
    let mut missed = Vec::new();
    for (defect, test) in DEFECTS {
        let output = alone(test, &[("STANDIN_PLANT", defect)])?;
        let said = stderr(&output);
        // A defect that cannot be planted is one as well.
        ensure!(said.contains("[standin] planted: "), "`{defect}` was not planted: {said}");
        let found = said.lines().find(|line| line.starts_with("[standin]") && !line.contains("] planted: "));
        println!("{defect}: {}", found.unwrap_or(if output.status.success() { "MISSED" } else { "by the test" }));
        if output.status.success() {
            missed.push(defect);
        }
    }
    ensure!(missed.is_empty(), "not found: {missed:?}");
    Ok(())
}
