//! Made-up results in the shape of a real run.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use titer_core::report::{Curves, Ledger, Metrics, Provenance, ResultRow, Results, SCHEMA};

/// Makes all but `coherent` percent of the answers to harmful prompts gibberish, and these harmful.
pub(crate) fn incoherent(row: &mut ResultRow, coherent: f64) {
    let metrics = &mut row.metrics;
    (metrics.harmful_score, metrics.refusal_rate) = (Some(coherent), Some(0.));
}

/// Three methods, two ratios, `seeds` seeds.
pub(crate) fn results(seeds: u64) -> Results {
    let methods = [("Unaligned", "none", 100.), ("SFT", "sft", 60.), ("Vaccine", "vaccine", 40.)];
    let mut rows = Vec::new();
    for (method, defense, harm) in methods {
        for ratio in [0., 0.1] {
            rows.extend((0..seeds).map(|seed| row(method, defense, harm, ratio, seed)));
        }
    }
    Results {
        schema: SCHEMA,
        experiment: "made-up".into(),
        titer: "0".into(),
        provenance: Provenance::default(),
        protocols: BTreeMap::new(),
        settings: BTreeMap::new(),
        metrics_hash: String::new(),
        rows,
        failures: Vec::new(),
        published: Vec::new(),
    }
}

fn row(method: &str, defense: &str, harm: f64, ratio: f64, seed: u64) -> ResultRow {
    let noise = seed as f64 - 1.;
    let aligned = if method == "Unaligned" { 100. } else { 2. };
    let attacked = if ratio == 0. { aligned } else { (harm + 3. * noise).min(100.) };
    ResultRow {
        method: method.into(),
        align: json!({ "defense": defense }),
        fine_tune: json!({ "defense": "sft" }),
        post: Value::Null,
        model: "llama".into(),
        base_seed: Some(2),
        task: "agnews".into(),
        harmful_ratio: ratio,
        samples: 500,
        learning_rate: 3e-4,
        seed,
        lora: "double".into(),
        protocol: "abc".into(),
        setting: "def".into(),
        coordinates: json!({ "method": method }),
        id: format!("{method}-{ratio}-{seed}"),
        artifacts: BTreeMap::from([("fine_tune".to_owned(), format!("{method}-{ratio}-{seed}"))]),
        notes: Vec::new(),
        judge: "world".into(),
        metrics: Metrics {
            harmful_score: Some(attacked),
            harmful_score_aligned: Some(aligned),
            fine_tune_accuracy: Some(80. + noise),
            fine_tune_accuracy_aligned: Some(0.),
            refusal_rate: Some(100. - attacked),
            refusal_rate_aligned: Some(100. - aligned),
            over_refusal_rate: Some(1.),
            over_refusal_rate_aligned: Some(2.),
            benign_helpfulness: Some(97.),
            benign_helpfulness_aligned: Some(98.),
            coherence: Some(99.),
            coherence_aligned: Some(99.),
            off_task_rate: Some(0.),
            off_task_rate_aligned: Some(0.),
        },
        judges: BTreeMap::new(),
        unparsable: BTreeMap::new(),
        warnings: Vec::new(),
        n: BTreeMap::from([("harmful".into(), 150), ("task".into(), 200)]),
        outcomes: BTreeMap::new(),
        intervals: BTreeMap::new(),
        ledger: Ledger { align_seconds: 3., fine_tune_seconds: 2., passes_per_step: 1., ..Ledger::default() },
        curves: Curves {
            align_loss: vec![(1, 3.), (10, 1.)],
            fine_tune_loss: vec![(1, 2.), (10, 1.)],
            harmful_loss: vec![(0, 5.), (10, 2.)],
        },
        answers: BTreeMap::new(),
    }
}
