//! Published values against ours as lines of text, for every rendering.

use serde::Serialize;
use titer_core::report::{Published, Results};

use super::table::number;
use crate::report::reproduction::{Comparison, Finding, compare};

/// The columns of a line.
pub(super) const HEADINGS: [&str; 8] =
    ["method", "cell", "metric", "ours (units)", "published", "tolerance", "verdict", "why"];

/// What the columns mean, for the foot of a table.
pub(super) const LEGEND: &str = "Published values are of single runs. The tolerance joins half of the 95 % Wilson \
                                 interval over their prompts with that over ours and half of the 95 % t interval over our \
                                 units (bases, or the seeds on a single one). Agreement that a plain fine-tuning \
                                 would reach too, or that our interval is too wide to deny, is no reproduction.";

/// The values of one publication's table.
#[derive(Debug, Serialize)]
pub(super) struct PublishedSection {
    /// Where they stand.
    pub source: String,
    /// How many were reproduced, not reproduced, and cannot be told.
    pub count: String,
    /// One line for each value, in the order of [`HEADINGS`].
    pub lines: Vec<[String; 8]>,
    /// What in the printed table does not follow from itself.
    pub notes: Vec<String>,
}

/// One section for each source, in the order of the configuration.
pub(super) fn sections(results: &Results) -> Vec<PublishedSection> {
    let compared = compare(results);
    let mut sources: Vec<&str> = Vec::new();
    for published in &results.published {
        if !sources.contains(&published.source.as_str()) {
            sources.push(&published.source);
        }
    }
    sources.into_iter().map(|source| section(results, &compared, source)).collect()
}

fn section(results: &Results, compared: &[Comparison], source: &str) -> PublishedSection {
    let here: Vec<&Comparison> = compared.iter().filter(|comparison| comparison.published.source == source).collect();
    let counted = [Finding::Reproduced, Finding::NotReproduced, Finding::CannotTell(String::new())].map(|finding| {
        let words = finding.words();
        format!("{} {words}", here.iter().filter(|comparison| comparison.finding.words() == words).count())
    });
    let sic = |published: &Published| Some(format!("{}, sic: {}", published.method, published.sic.as_ref()?));
    PublishedSection {
        source: source.to_owned(),
        count: counted.join(", "),
        lines: here.into_iter().map(line).collect(),
        notes: results.published.iter().filter(|published| published.source == source).filter_map(sic).collect(),
    }
}

fn line(comparison: &Comparison) -> [String; 8] {
    let Comparison { published, harmful_ratio, metric, theirs, ours, finding } = comparison;
    let (measured, tolerance) = match ours {
        Some((ours, tolerance)) => {
            (format!("{} ({})", number(Some(ours.summary)), ours.summary.n), format!("±{tolerance:.1}"))
        }
        None => ("–".to_owned(), "–".to_owned()),
    };
    [
        published.method.clone(),
        format!("{}, n = {}, p = {harmful_ratio}", published.task, published.samples),
        metric.short().to_owned(),
        measured,
        format!("{theirs:.1}"),
        tolerance,
        finding.words().to_owned(),
        finding.reason().to_owned(),
    ]
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use titer_core::report::PublishedPrompts;

    use super::*;
    use crate::report::{Format, console, render};
    use crate::results::fixture;

    #[test]
    fn every_rendering_has_each_verdict_with_its_reason() -> titer_core::Result<()> {
        let published = |judge: &str, harm: f64| Published {
            source: "<a> table".into(),
            method: "Vaccine".into(),
            task: "agnews".into(),
            samples: 500,
            harmful_ratios: vec![0.1],
            harmful_score: vec![harm],
            n_prompts: PublishedPrompts { harmful: 500, task: 500 },
            judge: judge.into(),
            sic: Some("an average is wrong".into()),
            ..Published::default()
        };
        let published = vec![published("world", 40.), published("world", 75.), published("another", 40.)];
        let results = Results { published, ..fixture::results(1) };
        let sections = sections(&results);
        assert_eq!(sections.len(), 1);
        assert_eq!(sections[0].count, "1 reproduced, 1 not reproduced, 1 cannot tell");
        assert_eq!(sections[0].lines[0][..5], ["Vaccine", "agnews, n = 500, p = 0.1", "HS", "37.0 (1)", "40.0"]);
        let folder = Path::new(".");
        for text in [console(&results)?, render(&results, folder, Format::Md)?, render(&results, folder, Format::Html)?]
        {
            for expected in [&sections[0].count, "another judge", "an average is wrong", LEGEND] {
                assert!(text.contains(expected), "no `{expected}` in\n{text}");
            }
        }
        assert!(!render(&results, folder, Format::Html)?.contains("<a> table"));
        assert!(!console(&fixture::results(1))?.contains(LEGEND), "nothing published, nothing said");
        Ok(())
    }
}
