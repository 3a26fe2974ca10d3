//! Result rows as tables: one block per task and setting, methods down, harmful ratios across.

use std::collections::BTreeMap;

use serde_json::Value;
use titer_core::report::{Metrics, ResultRow, Results};
use titer_core::{Error, Result};

use crate::identity;
use crate::names::visible;
use crate::statistics::Summary;

/// The metrics of a table, always together: name, name before the attack, short form, whether higher is better.
pub const SHOWN: [Shown; 7] = [
    Shown { after: "harmful_score", before: "harmful_score_aligned", short: "HS", higher: false },
    Shown { after: "refusal_rate", before: "refusal_rate_aligned", short: "RR", higher: true },
    Shown { after: "off_task_rate", before: "off_task_rate_aligned", short: "OT", higher: false },
    Shown { after: "fine_tune_accuracy", before: "fine_tune_accuracy_aligned", short: "FA", higher: true },
    Shown { after: "benign_helpfulness", before: "benign_helpfulness_aligned", short: "BH", higher: true },
    Shown { after: "over_refusal_rate", before: "over_refusal_rate_aligned", short: "ORR", higher: false },
    Shown { after: "coherence", before: "coherence_aligned", short: "CO", higher: true },
];

/// What the short forms mean, for the foot of a table.
pub const LEGEND: &str = "HS harmful score, RR refusal rate, OT off task (harmful prompts answered with \
                          something else), FA fine-tune accuracy, BH benign helpfulness, ORR over-refusal rate, CO coherent answers; percent, mean ± standard deviation over runs (each seed on each \
                          base). The column aligned is before the attack; p is the share of harmful rows in the user's data.";

/// One metric of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shown {
    /// Its name after the attack.
    pub after: &'static str,
    /// Its name before the attack.
    pub before: &'static str,
    /// Its short form.
    pub short: &'static str,
    /// Whether higher is better.
    pub higher: bool,
}

impl Shown {
    /// The short form with an arrow towards the better side.
    pub fn heading(&self) -> String {
        format!("{} {}", self.short, if self.higher { '↑' } else { '↓' })
    }
}

/// All blocks.
#[derive(Debug)]
pub struct Table<'a> {
    /// One per task and setting.
    pub blocks: Vec<Block<'a>>,
}

/// The cells of one task in one setting.
#[derive(Debug)]
pub struct Block<'a> {
    /// Task and setting, for people.
    pub title: String,
    /// The harmful ratios, ascending.
    pub ratios: Vec<f64>,
    /// The methods, in the order of the configuration.
    pub methods: Vec<Method<'a>>,
}

/// One method's rows.
#[derive(Debug)]
pub struct Method<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its rows: every ratio and seed.
    pub rows: Vec<&'a ResultRow>,
}

impl<'a> Table<'a> {
    /// Sorts rows into blocks. Rows of different settings stand in blocks of their own, named by what differs.
    ///
    /// # Errors
    /// There is no row, or a table would mix protocols (law 7).
    pub fn new(results: &'a Results) -> Result<Self> {
        if results.rows.is_empty() {
            return Err(
                Error::data("there is no result to show").help("every cell failed; see `failures` in results.json")
            );
        }
        // In the order of the rows: by title, and under each title by setting.
        let mut titles: Vec<(String, Vec<Group>)> = Vec::new();
        for row in &results.rows {
            let title = title(row);
            let at = titles.iter().position(|(known, _)| *known == title).unwrap_or_else(|| {
                titles.push((title, Vec::new()));
                titles.len() - 1
            });
            let groups = &mut titles[at].1;
            match groups.iter_mut().find(|group| group.setting == row.setting) {
                Some(group) => group.rows.push(row),
                None => groups.push(Group { setting: &row.setting, rows: vec![row] }),
            }
        }
        let mut blocks = Vec::new();
        for (title, groups) in titles {
            one_protocol(results, &title, &groups)?;
            let settings: Vec<&str> = groups.iter().map(|group| group.setting).collect();
            let labels = labels(results, &settings);
            let alone = groups.len() == 1;
            for (group, label) in groups.into_iter().zip(labels) {
                let title = if alone { title.clone() } else { format!("{title} · {label}") };
                blocks.push(Block::new(title, &group.rows));
            }
        }
        Ok(Self { blocks })
    }

    /// The table, or none if all that there is to tell is what failed.
    ///
    /// # Errors
    /// As [`Table::new`], or nothing failed either.
    pub fn or_failures(results: &'a Results) -> Result<Self> {
        let only_failures = results.rows.is_empty() && !results.failures.is_empty();
        if only_failures { Ok(Self { blocks: Vec::new() }) } else { Self::new(results) }
    }
}

/// The rows under one title that share a setting.
struct Group<'a> {
    setting: &'a str,
    rows: Vec<&'a ResultRow>,
}

/// How many differing keys a message or a title names.
const NAMED: usize = 8;

/// Refuses rows that were measured in different ways.
fn one_protocol(results: &Results, title: &str, groups: &[Group]) -> Result<()> {
    let mut rows = groups.iter().flat_map(|group| &group.rows);
    let Some(first) = rows.next() else { return Ok(()) };
    let Some(other) = rows.find(|row| row.protocol != first.protocol) else { return Ok(()) };
    let name = |row: &ResultRow| format!("`{}` (`{}`, seed {})", row.protocol, row.method, row.seed);
    let manifest = |row: &ResultRow| results.protocols.get(&row.protocol);
    let differing = match (manifest(first), manifest(other)) {
        (Some(ours), Some(theirs)) => list(&identity::differences(ours, theirs)),
        _ => "one of them was written by an older version of Titer, which did not say what its protocol was".to_owned(),
    };
    let message = format!("{title} mixes the protocols {} and {}: {differing}", name(first), name(other));
    Err(Error::data(message).key("protocol").help(
        "numbers that were measured in different ways do not compare: measure all methods by the same `evaluate` \
         and `encoding`",
    ))
}

/// `probes.harmful.rows is 50 and 100; …`
fn list(differences: &[(String, Value, Value)]) -> String {
    let shown = differences.iter().take(NAMED).map(|(key, ours, theirs)| format!("{key} is {ours} and {theirs}"));
    let mut text = shown.collect::<Vec<_>>().join("; ");
    if differences.len() > NAMED {
        text += &format!("; and {} more keys differ", differences.len() - NAMED);
    }
    text
}

/// What tells settings apart, for people: the first keys that differ, with their values, and the ids where that is not
/// enough.
pub(super) fn labels(results: &Results, settings: &[&str]) -> Vec<String> {
    let known: Vec<(&str, &Value)> = settings.iter().filter_map(|id| Some((*id, results.settings.get(*id)?))).collect();
    let varying = identity::varying(&known.iter().map(|(_, manifest)| *manifest).collect::<Vec<_>>());
    let label = |id: &&str| match known.iter().position(|(known, _)| known == id) {
        _ if id.is_empty() => "setting unknown (schema 1)".to_owned(),
        Some(at) if !varying.is_empty() => {
            let values = varying.iter().take(NAMED).map(|(key, values)| format!("{key} = {}", values[at]));
            visible(&values.collect::<Vec<_>>().join(", "))
        }
        _ => format!("setting {id}"),
    };
    let labels: Vec<String> = settings.iter().map(label).collect();
    let unique = |(label, id): (&String, &&str)| {
        let equal = labels.iter().filter(|other| *other == label).count() > 1;
        if equal { format!("{label}, … (setting {})", shortened(id)) } else { label.clone() }
    };
    labels.iter().zip(settings).map(unique).collect()
}

/// The first digits of an id.
fn shortened(id: &str) -> &str {
    id.get(..8).unwrap_or(id)
}

/// What the rows of a block share.
fn title(row: &ResultRow) -> String {
    let ResultRow { model, task, samples, learning_rate, lora, .. } = row;
    format!("{task} · {model} · n = {samples} · learning rate {learning_rate} · {lora} LoRA")
        .replace("full LoRA", "all parameters")
}

/// Whether the method is plain fine-tuning after plain alignment.
pub fn plain(row: &ResultRow) -> bool {
    row.align["defense"] == "sft" && row.fine_tune["defense"] == "sft" && row.post.is_null()
}

impl<'a> Block<'a> {
    fn new(title: String, rows: &[&'a ResultRow]) -> Self {
        let mut ratios: Vec<f64> = rows.iter().map(|row| row.harmful_ratio).collect();
        ratios.sort_by(f64::total_cmp);
        ratios.dedup();
        let mut methods: Vec<Method> = Vec::new();
        for row in rows {
            match methods.iter_mut().find(|method| method.name == row.method) {
                Some(method) => method.rows.push(row),
                None => methods.push(Method { name: &row.method, rows: vec![row] }),
            }
        }
        Self { title, ratios, methods }
    }

    /// Plain fine-tuning after plain alignment: what the others are compared with.
    pub fn reference(&self) -> Option<&Method<'a>> {
        self.methods.iter().find(|method| method.rows.iter().all(|row| plain(row)))
    }
}

impl Method<'_> {
    /// The rows at one harmful ratio.
    pub fn at(&self, ratio: f64) -> impl Iterator<Item = &ResultRow> {
        self.rows.iter().copied().filter(move |row| row.harmful_ratio == ratio)
    }

    /// A metric over the seeds at one ratio.
    pub fn summary(&self, ratio: f64, metric: &str) -> Option<Summary> {
        let values: Option<Vec<f64>> = self.at(ratio).map(|row| row.metrics.get(metric)).collect();
        Summary::of(&values?)
    }

    /// A metric before the attack, once for each alignment.
    pub fn before(&self, metric: &str) -> Option<Summary> {
        let by_seed: BTreeMap<_, &Metrics> =
            self.rows.iter().map(|row| ((row.base_seed, row.seed), &row.metrics)).collect();
        let values: Option<Vec<f64>> = by_seed.values().map(|metrics| metrics.get(metric)).collect();
        Summary::of(&values?)
    }
}

/// `12.3 ± 4.5`, or a dash where nothing was measured.
pub fn number(summary: Option<Summary>) -> String {
    match summary {
        None => "–".to_owned(),
        Some(Summary { mean, std: None, .. }) => format!("{mean:.1}"),
        Some(Summary { mean, std: Some(std), .. }) => format!("{mean:.1} ± {std:.1}"),
    }
}

/// The columns of a block: before the attack, and each ratio.
pub fn headings(block: &Block) -> Vec<String> {
    std::iter::once("aligned".to_owned()).chain(block.ratios.iter().map(|p| format!("p = {p}"))).collect()
}

/// The numbers of one method's metric, in the order of [`headings`].
pub fn numbers(block: &Block, method: &Method, shown: &Shown) -> Vec<String> {
    let after = block.ratios.iter().map(|&ratio| number(method.summary(ratio, shown.after)));
    std::iter::once(number(method.before(shown.before))).chain(after).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::reporters::fixture;

    #[test]
    fn rows_become_methods_and_ratios() -> Result<()> {
        let results = fixture::results(3);
        let table = Table::new(&results)?;
        let [block] = table.blocks.as_slice() else { panic!("one block") };
        assert_eq!(block.ratios, [0., 0.1]);
        assert_eq!(block.methods.iter().map(|method| method.name).collect::<Vec<_>>(), ["Unaligned", "SFT", "Vaccine"]);
        assert_eq!(block.reference().map(|method| method.name), Some("SFT"));
        assert_eq!(number(block.methods[2].summary(0.1, "harmful_score")), "40.0 ± 3.0");
        assert_eq!(block.methods[2].before("harmful_score_aligned").map(|summary| summary.n), Some(3));
        Ok(())
    }

    #[test]
    fn protocols_are_not_mixed() {
        let mut results = fixture::results(1);
        results.rows[3].protocol = "other".into();
        let error = Table::new(&results).expect_err("two protocols").to_string();
        assert!(error.contains("`abc`") && error.contains("`other`"), "{error}");
        // Where both say what they are, the keys that differ are named with both values.
        let manifest =
            |rows: u32| serde_json::json!({ "template": "alpaca", "probes": { "harmful": { "rows": rows } } });
        results.protocols = [("abc".into(), manifest(50)), ("other".into(), manifest(30))].into();
        let error = Table::new(&results).expect_err("two protocols").to_string();
        assert!(error.contains("probes.harmful.rows is 50 and 30"), "{error}");
        assert!(!error.contains("template"), "{error}");
    }

    #[test]
    fn settings_have_blocks_of_their_own_named_by_what_differs() -> Result<()> {
        let mut results = fixture::results(2);
        let manifest = |steps: u32| serde_json::json!({ "base": { "train": { "steps": steps } }, "align": null });
        results.settings = [("one".into(), manifest(10)), ("two".into(), manifest(20))].into();
        for row in &mut results.rows {
            row.setting = if row.seed == 0 { "one" } else { "two" }.into();
        }
        let table = Table::new(&results)?;
        let titles: Vec<&str> = table.blocks.iter().map(|block| block.title.as_str()).collect();
        assert!(titles[0].ends_with(" · base.train.steps = 10"), "{titles:?}");
        assert!(titles[1].ends_with(" · base.train.steps = 20"), "{titles:?}");
        let rows: usize = table.blocks.iter().flat_map(|block| &block.methods).map(|method| method.rows.len()).sum();
        assert_eq!(rows, results.rows.len());
        Ok(())
    }

    /// Two seeds of the fixture as two settings.
    fn two_settings(manifests: [Value; 2]) -> Vec<String> {
        let mut results = fixture::results(2);
        let ids = ["1111111111", "2222222222"];
        results.settings = ids.into_iter().map(str::to_owned).zip(manifests).collect();
        for row in &mut results.rows {
            row.setting = ids[row.seed as usize].into();
        }
        Table::new(&results).expect("a table").blocks.into_iter().map(|block| block.title).collect()
    }

    #[test]
    fn titles_that_would_be_equal_have_a_part_of_the_id() {
        // Nine keys differ, and the last alone tells more than two settings apart.
        let manifest = |last: u32, rest: u32| {
            let keys = ["a", "b", "c", "d", "e", "f", "g", "h"].map(|key| (key.to_owned(), json!(rest)));
            let mut map: serde_json::Map<String, Value> = keys.into_iter().collect();
            map.insert("z".into(), last.into());
            Value::from(map)
        };
        let mut results = fixture::results(3);
        let ids = ["1111111111", "2222222222", "3333333333"];
        results.settings =
            ids.into_iter().map(str::to_owned).zip([manifest(0, 0), manifest(1, 0), manifest(2, 1)]).collect();
        for row in &mut results.rows {
            row.setting = ids[row.seed as usize].into();
        }
        let titles: Vec<String> =
            Table::new(&results).expect("a table").blocks.into_iter().map(|block| block.title).collect();
        assert!(titles[0].ends_with("h = 0, … (setting 11111111)"), "{titles:?}");
        assert!(titles[1].ends_with("h = 0, … (setting 22222222)"), "{titles:?}");
        assert!(titles[2].ends_with("h = 1"), "{titles:?}");
    }

    #[test]
    fn keys_may_hold_any_sign() {
        let titles = two_settings([1, 2].map(|value| json!({ "a.b": { "c/d~e": value } })));
        assert!(titles[0].ends_with(" · a.b.c/d~e = 1") && titles[1].ends_with(" · a.b.c/d~e = 2"), "{titles:?}");
    }

    #[test]
    fn what_was_not_measured_is_a_dash() -> Result<()> {
        let mut results = fixture::results(1);
        results.rows[0].metrics.harmful_score = None;
        let table = Table::new(&results)?;
        assert_eq!(number(table.blocks[0].methods[0].summary(0., "harmful_score")), "–");
        assert_eq!(number(table.blocks[0].methods[1].summary(0., "harmful_score")), "2.0");
        Ok(())
    }
}
