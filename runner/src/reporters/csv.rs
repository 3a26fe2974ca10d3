//! One line for each result row.

use titer_core::report::{METRICS, Results};
use titer_core::{Error, Result};

/// The table, with a header line.
pub(super) fn render(results: &Results) -> Result<String> {
    let failed = |error: &dyn std::fmt::Display| Error::run(format!("cannot write CSV: {error}"));
    let mut writer = csv::Writer::from_writer(Vec::new());
    let settings =
        ["method", "task", "model", "base_seed", "harmful_ratio", "samples", "learning_rate", "lora", "seed"];
    let header = settings.into_iter().chain(METRICS.iter().map(|metric| metric.0)).chain(["judge", "protocol"]);
    writer.write_record(header).map_err(|error| failed(&error))?;
    for row in &results.rows {
        let settings = [
            text(&row.method),
            text(&row.task),
            text(&row.model),
            row.base_seed.map_or_else(String::new, |seed| seed.to_string()),
            row.harmful_ratio.to_string(),
            row.samples.to_string(),
            row.learning_rate.to_string(),
            text(&row.lora),
            row.seed.to_string(),
        ];
        let metric = |name: &str| row.metrics.get(name).map_or_else(String::new, |value| value.to_string());
        let metrics = METRICS.iter().map(|(name, ..)| metric(name));
        let record = settings.into_iter().chain(metrics).chain([text(&row.judge), text(&row.protocol)]);
        writer.write_record(record).map_err(|error| failed(&error))?;
    }
    let bytes = writer.into_inner().map_err(|error| failed(&error))?;
    String::from_utf8(bytes).map_err(|error| failed(&error))
}

/// Text that a spreadsheet does not take for a formula.
fn text(text: &str) -> String {
    if text.starts_with(['=', '+', '-', '@', '\t', '\r']) { format!("'{text}") } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_newlines_and_formulas_are_tamed() -> Result<()> {
        let mut results = crate::reporters::fixture::results(1);
        results.rows.truncate(1);
        results.rows[0].method = "=SUM(\"a\",\n1)".into();
        let text = render(&results)?;
        assert!(text.contains("\"'=SUM(\"\"a\"\",\n1)\""), "{text}");
        Ok(())
    }
}
