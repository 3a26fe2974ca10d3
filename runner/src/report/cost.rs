//! What a method cost and what it must know: beside its numbers, since methods that differ in these do not compare as
//! equals.

use std::collections::BTreeSet;

use serde::Serialize;
use titer_core::report::{Ledger, ResultRow};

use super::table::MethodRows;
use crate::names::visible_json;

/// What the peaks are, for the foot of a table.
pub(super) const PEAK_NOTE: &str = "Peak memory is the heap that the stage itself asked for, whatever ran beside it, or on a \
                                    GPU what its tensors took there; a dash where there is no such stage.";

/// One method's costs, as means over its rows, ready to be shown.
#[derive(Debug, Serialize)]
pub(super) struct Cost {
    /// The method.
    pub method: String,
    /// Passes per step of alignment and of fine-tuning.
    pub passes: String,
    /// Seconds of alignment, fine-tuning and what follows it.
    pub seconds: String,
    /// Peak memory of alignment, fine-tuning and what follows it, MiB.
    pub peak: String,
    /// What it must know beyond the data of each stage.
    pub needs: String,
    /// What a reader must know about the combination.
    pub notes: String,
    /// Its defenses and their settings.
    pub settings: String,
}

impl Cost {
    /// The headings of [`Cost::cells`].
    pub(super) const HEADINGS: [&str; 5] = [
        "method",
        "passes a step (align, fine-tune)",
        "seconds (align, fine-tune, post)",
        "peak MiB (align, fine-tune, post)",
        "must know",
    ];

    pub(super) fn of(method: &MethodRows) -> Self {
        let mean =
            |of: fn(&ResultRow) -> f64| method.rows.iter().map(|row| of(row)).sum::<f64>() / method.rows.len() as f64;
        let row = method.rows[0];
        let passes = [mean(|row| row.ledger.passes_per_step), mean(|row| row.ledger.fine_tune_passes_per_step)];
        let seconds = [
            mean(|row| row.ledger.align_seconds),
            mean(|row| row.ledger.fine_tune_seconds),
            mean(|row| row.ledger.post_seconds),
        ];
        let peak = |of: fn(&Ledger) -> Option<u64>| {
            let peaks: Option<Vec<u64>> = method.rows.iter().map(|row| of(&row.ledger)).collect();
            let mean = |peaks: Vec<u64>| peaks.iter().sum::<u64>() as f64 / peaks.len() as f64 / f64::from(1 << 20);
            peaks.map_or_else(|| "–".to_owned(), |peaks| format!("{:.1}", mean(peaks)))
        };
        let peaks = [
            peak(|ledger| ledger.align_peak_bytes),
            peak(|ledger| ledger.fine_tune_peak_bytes),
            peak(|ledger| ledger.post_peak_bytes),
        ];
        let settings = [("align", &row.align), ("fine-tune", &row.fine_tune), ("post", &row.post)];
        let settings = settings.into_iter().filter(|(_, value)| !value.is_null());
        Self {
            method: method.name.to_owned(),
            passes: passes.map(|passes| format!("{passes:.2}")).join(", "),
            seconds: seconds.map(|seconds| format!("{seconds:.1}")).join(", "),
            peak: peaks.join(", "),
            needs: needs(row),
            notes: row.notes.join("; "),
            settings: visible_json(
                &settings.map(|(stage, value)| format!("{stage} {value}")).collect::<Vec<_>>().join("; "),
            ),
        }
    }

    /// What a narrow table shows.
    pub(super) fn cells(&self) -> [&str; 5] {
        [&self.method, &self.passes, &self.seconds, &self.peak, &self.needs]
    }
}

/// Every need once; "none" only if there is nothing else.
fn needs(row: &ResultRow) -> String {
    let needs: BTreeSet<&str> =
        row.ledger.privileged.values().map(String::as_str).filter(|need| *need != "none").collect();
    if needs.is_empty() { "none".to_owned() } else { needs.into_iter().collect::<Vec<_>>().join("; ") }
}
