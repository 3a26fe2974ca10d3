//! The axes of an experiment: all that its cells can differ in.
//!
//! This list is the one definition of a cell's coordinates. The planner, labels, results, names of files, CSV, the blocks of
//! tables and comparisons follow from it. A new axis is one more entry here, and a list in the configuration if there is
//! none yet.

use std::fmt;

use serde_json::{Map, Value, json};
use titer_core::report::ResultRow;

use super::config::Config;
use super::spec::AdapterSpec;
use super::{Base, Experiment, Method, UserRows};

/// One axis.
#[derive(Debug, Clone, Copy)]
pub struct Axis {
    /// Its name in coordinates and in tables for programs.
    pub name: &'static str,
    /// What stands before a value in labels.
    pub prefix: &'static str,
    /// What stands before a value in the title of a block.
    pub title: &'static str,
    /// The key of the configuration that lists the values.
    pub key: &'static str,
    /// The first stage that depends on it.
    pub since: Since,
    /// Where its values stand in a table.
    pub place: Place,
    /// Where the [setting's manifest](crate::plan::identity::setting) would hold the value. A coordinate is no part of the
    /// setting, so it is left out there.
    pub in_setting: &'static [&'static str],
    /// How many values the configuration lists.
    pub listed: fn(&Config) -> usize,
    /// Gives a point the value of that index and returns it as a coordinate; `None` after the last value.
    pub set: for<'a> fn(&mut Point<'a>, usize) -> Option<Value>,
}

/// The first stage that depends on an axis: stages before it are shared by all its values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Since {
    /// The base model.
    Base,
    /// The alignment.
    Align,
    /// The user's fine-tuning.
    FineTune,
}

/// Where the values of an axis stand in a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Down the table.
    Rows,
    /// Across the table.
    Columns,
    /// In tables of their own.
    Blocks,
    /// Nowhere: a value of the table is a mean over them.
    Runs,
}

/// Every axis, the one that varies slowest first.
pub const AXES: &[Axis] = &[
    Axis {
        name: "method",
        prefix: "",
        title: "",
        key: "methods",
        since: Since::Align,
        place: Place::Rows,
        in_setting: &[],
        listed: |config| config.methods.len(),
        set: |point, index| {
            point.method = point.experiment.methods.get(index)?;
            Some(json!(point.method.name))
        },
    },
    Axis {
        name: "task",
        prefix: "",
        title: "",
        key: "fine_tune.tasks",
        since: Since::FineTune,
        place: Place::Blocks,
        in_setting: &[],
        listed: |config| config.fine_tune.tasks.len(),
        set: |point, index| {
            point.task = point.experiment.fine_tune.tasks.get(index)?;
            Some(json!(point.task.name))
        },
    },
    Axis {
        name: "harmful_ratio",
        prefix: "p=",
        title: "p = ",
        key: "fine_tune.harmful_ratios",
        since: Since::FineTune,
        place: Place::Columns,
        in_setting: &[],
        listed: |config| config.fine_tune.harmful_ratios.len(),
        set: |point, index| {
            point.harmful_ratio = *point.experiment.fine_tune.ratios.get(index)?;
            Some(json!(point.harmful_ratio))
        },
    },
    Axis {
        name: "samples",
        prefix: "n=",
        title: "n = ",
        key: "fine_tune.samples",
        since: Since::FineTune,
        place: Place::Blocks,
        in_setting: &[],
        listed: |config| config.fine_tune.samples.as_slice().len(),
        set: |point, index| {
            point.samples = *point.experiment.fine_tune.samples.get(index)?;
            Some(json!(point.samples))
        },
    },
    Axis {
        name: "learning_rate",
        prefix: "lr=",
        title: "learning rate ",
        key: "fine_tune.learning_rates",
        since: Since::FineTune,
        place: Place::Blocks,
        in_setting: &["attack.train.learning_rate"],
        // Without a list it is that of `train`.
        listed: |config| config.fine_tune.learning_rates.len().max(1),
        set: |point, index| {
            point.learning_rate = *point.experiment.fine_tune.learning_rates.get(index)?;
            Some(json!(point.learning_rate))
        },
    },
    Axis {
        name: "base_seed",
        prefix: "base ",
        title: "base ",
        key: "base.seeds",
        since: Since::Base,
        place: Place::Runs,
        in_setting: &["base.seed"],
        listed: |config| if config.base.pretrain.is_some() { config.base.seeds.len() } else { 1 },
        set: |point, index| {
            point.base = point.experiment.bases.get(index)?;
            Some(json!(point.base.seed()))
        },
    },
    Axis {
        name: "seed",
        prefix: "seed ",
        title: "seed ",
        key: "seeds",
        since: Since::Align,
        place: Place::Runs,
        in_setting: &[],
        listed: |config| config.seeds.len(),
        set: |point, index| {
            point.seed = *point.experiment.seeds.get(index)?;
            Some(json!(point.seed))
        },
    },
];

/// The parts of an experiment that make one cell.
#[derive(Debug, Clone)]
pub struct Point<'a> {
    /// What all cells share.
    pub experiment: &'a Experiment,
    /// The method.
    pub method: &'a Method,
    /// The base.
    pub base: &'a Base,
    /// The user's task.
    pub task: &'a UserRows,
    /// The share of harmful rows.
    pub harmful_ratio: f64,
    /// Rows of user data.
    pub samples: usize,
    /// Peak learning rate of fine-tuning.
    pub learning_rate: f64,
    /// The seed of everything after the base.
    pub seed: u64,
    /// What alignment trains, if the experiment aligns.
    pub align_adapter: Option<AdapterSpec>,
    /// What fine-tuning trains.
    pub user_adapter: AdapterSpec,
    /// The value of each axis by its name.
    pub coordinates: Map<String, Value>,
}

impl<'a> Point<'a> {
    /// The point at the first value of every axis of [`AXES`]; `None` if an axis has no value.
    fn first(experiment: &'a Experiment) -> Option<Self> {
        Some(Self {
            experiment,
            method: experiment.methods.first()?,
            base: experiment.bases.first()?,
            task: experiment.fine_tune.tasks.first()?,
            harmful_ratio: *experiment.fine_tune.ratios.first()?,
            samples: *experiment.fine_tune.samples.first()?,
            learning_rate: *experiment.fine_tune.learning_rates.first()?,
            seed: *experiment.seeds.first()?,
            align_adapter: experiment.align.as_ref().map(|align| align.adapter.clone()),
            user_adapter: experiment.fine_tune.adapter.clone(),
            coordinates: Map::new(),
        })
    }

    /// Every cell of an experiment with these axes.
    pub fn all(experiment: &'a Experiment, axes: &[Axis]) -> Vec<Self> {
        let mut points: Vec<Self> = Self::first(experiment).into_iter().collect();
        for axis in axes {
            let along = |point: Self| {
                (0..).map_while(move |index| {
                    let mut point = point.clone();
                    let value = (axis.set)(&mut point, index)?;
                    point.coordinates.insert(axis.name.to_owned(), value);
                    Some(point)
                })
            };
            points = points.into_iter().flat_map(along).collect();
        }
        points
    }
}

/// The place of a cell or row: the value of each axis, in the order of [`AXES`], and then those of axes that this version
/// does not know.
#[derive(Debug, Clone, PartialEq)]
pub struct Coordinates(Vec<Coordinate>);

/// The value of one axis.
#[derive(Debug, Clone, PartialEq)]
pub struct Coordinate {
    /// The axis.
    pub name: String,
    /// Where it stands in tables.
    pub place: Place,
    /// The value as text; empty if there is none.
    pub value: String,
    prefix: String,
    title: String,
}

/// The key of coordinates that says what a method is. It is no axis: it goes with the method.
pub const DEFENSES: &str = "defenses";

impl Coordinates {
    /// Those of a cell.
    pub fn of(values: &Map<String, Value>) -> Self {
        let known = AXES.iter().map(|axis| Coordinate {
            name: axis.name.to_owned(),
            place: axis.place,
            value: values.get(axis.name).map_or_else(String::new, text),
            prefix: axis.prefix.to_owned(),
            title: axis.title.to_owned(),
        });
        let unknown = |name: &&String| *name != DEFENSES && AXES.iter().all(|axis| axis.name != name.as_str());
        let more = values.iter().filter(|(name, _)| unknown(name)).map(|(name, value)| Coordinate {
            name: name.clone(),
            place: Place::Blocks,
            value: text(value),
            prefix: format!("{name}="),
            title: format!("{name} = "),
        });
        Self(known.chain(more).collect())
    }

    /// Those of a row. What the row says by itself counts: names may have been made readable or told apart.
    pub fn of_row(row: &ResultRow) -> Self {
        let mut values = row.coordinates.as_object().cloned().unwrap_or_default();
        let ResultRow { method, task, harmful_ratio, samples, learning_rate, base_seed, seed, .. } = row;
        let own = json!({
            "method": method,
            "task": task,
            "harmful_ratio": harmful_ratio,
            "samples": samples,
            "learning_rate": learning_rate,
            "base_seed": base_seed,
            "seed": seed,
        });
        values.extend(own.as_object().cloned().unwrap_or_default());
        Self::of(&values)
    }

    /// Every coordinate.
    pub fn iter(&self) -> impl Iterator<Item = &Coordinate> {
        self.0.iter()
    }

    /// What tells the tables apart that rows stand in.
    pub fn of_block(&self) -> impl Iterator<Item = &Coordinate> {
        self.iter().filter(|coordinate| coordinate.place == Place::Blocks)
    }

    /// The terms of a label, for axes that have a value: `p=0.1`.
    pub fn terms(&self) -> impl Iterator<Item = String> {
        self.iter().filter(|coordinate| !coordinate.value.is_empty()).map(ToString::to_string)
    }

    /// `Vaccine, agnews, p=0.1, n=500, lr=0.0003, base 1, seed 0`.
    pub fn label(&self) -> String {
        self.terms().collect::<Vec<_>>().join(", ")
    }

    /// Whether `words` are some of the terms, separated by commas.
    pub fn has(&self, words: &str) -> bool {
        let terms: Vec<String> = self.terms().map(|term| self.normal(&term)).collect();
        let pieces: Vec<&str> = words.split(',').collect();
        let mut rest = pieces.as_slice();
        while !rest.is_empty() {
            // A name may have commas of its own.
            let is_term = |taken: &usize| terms.contains(&self.normal(&rest[..*taken].join(",")));
            let Some(taken) = (1..=rest.len()).rev().find(is_term) else { return false };
            rest = &rest[taken..];
        }
        true
    }

    /// A term so that `p=0.2`, `P 0.20` and `harmful_ratio = 0.2`, as the column is called in CSV, are one.
    fn normal(&self, term: &str) -> String {
        let word = |word: &str| word.parse::<f64>().map_or_else(|_| word.to_owned(), |number| number.to_string());
        let mut term = term.to_lowercase();
        if let Some((name, value)) = term.split_once('=').map(|(name, value)| (name.trim(), value))
            && let Some(axis) = self.iter().find(|coordinate| coordinate.name == name)
        {
            term = format!("{}{value}", axis.prefix);
        }
        term.replace('=', " ").split_whitespace().map(word).collect::<Vec<_>>().join(" ")
    }
}

impl Coordinate {
    /// As in the title of a block: `n = 500`.
    pub fn titled(&self) -> String {
        format!("{}{}", self.title, self.value)
    }
}

/// As in a label: `n=500`.
impl fmt::Display for Coordinate {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}{}", self.prefix, self.value)
    }
}

/// A value for people: `0.0003` rather than `3e-4`, and no quotes.
fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Number(number) => match number.as_u64() {
            Some(whole) => whole.to_string(),
            None => number.as_f64().map_or_else(|| number.to_string(), |number| number.to_string()),
        },
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn coordinates() -> Coordinates {
        let values = json!({
            "method": "Vaccine, strong (rho = 3)",
            "task": "agnews",
            "harmful_ratio": 0.2,
            "samples": 500,
            "learning_rate": 3e-4,
            "base_seed": 1,
            "seed": 0,
            "lora_r": 4,
            "defenses": {},
        });
        Coordinates::of(values.as_object().unwrap())
    }

    #[test]
    fn words_mean_a_cell_however_numbers_are_written() {
        let label = coordinates();
        let text = "Vaccine, strong (rho = 3), agnews, p=0.2, n=500, lr=0.0003, base 1, seed 0, lora_r=4";
        assert_eq!(label.label(), text);
        for words in [
            text,
            "p=0.20",
            "P = .2, seed=0",
            "lr=3e-4",
            "seed 0, vaccine, strong (rho = 3), base=1",
            "AGNEWS",
            "method=Vaccine, strong (rho = 3), task = agnews, harmful_ratio=0.2, samples=500, learning_rate=3e-4, base_seed=1",
            "lora_r = 4",
        ] {
            assert!(label.has(words), "{words}");
        }
        for words in ["", "p=0.1", "vaccine", "strong (rho = 3)", "seed 1", "p=0.2, seed 1", "agnews,", "lora_r=8"] {
            assert!(!label.has(words), "{words}");
        }
    }

    #[test]
    fn numbers_stand_as_people_write_them() {
        let shown =
            [json!(0.0), json!(1e-5), json!(1.0), json!(20_000_000), json!(null), json!("a b")].map(|v| text(&v));
        assert_eq!(shown, ["0", "0.00001", "1", "20000000", "", "a b"]);
    }
}
