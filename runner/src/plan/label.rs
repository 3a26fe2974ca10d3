//! A cell in words, and whether words mean it.

use std::fmt;

use titer_core::report::ResultRow;

use crate::plan::Cell;

/// What a cell is called: `Vaccine, agnews, p=0.1, n=500, lr=0.0003, base 1, seed 0`.
#[derive(Debug, Clone, Copy)]
pub struct Label<'a> {
    method: &'a str,
    task: &'a str,
    harmful_ratio: f64,
    samples: usize,
    learning_rate: f64,
    base_seed: Option<u64>,
    seed: u64,
}

impl<'a> From<&'a Cell> for Label<'a> {
    fn from(cell: &'a Cell) -> Self {
        let Cell { method, task, harmful_ratio, samples, learning_rate, base_seed, seed, .. } = cell;
        let (harmful_ratio, samples, learning_rate) = (*harmful_ratio, *samples, *learning_rate);
        Self { method, task, harmful_ratio, samples, learning_rate, base_seed: *base_seed, seed: *seed }
    }
}

impl<'a> From<&'a ResultRow> for Label<'a> {
    fn from(row: &'a ResultRow) -> Self {
        let ResultRow { method, task, harmful_ratio, samples, learning_rate, base_seed, seed, .. } = row;
        let (harmful_ratio, samples, learning_rate) = (*harmful_ratio, *samples, *learning_rate);
        Self { method, task, harmful_ratio, samples, learning_rate, base_seed: *base_seed, seed: *seed }
    }
}

impl fmt::Display for Label<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.terms().join(", "))
    }
}

impl Label<'_> {
    fn terms(&self) -> Vec<String> {
        let Self { method, task, harmful_ratio, samples, learning_rate, base_seed, seed } = self;
        let mut terms = vec![
            (*method).to_owned(),
            (*task).to_owned(),
            format!("p={harmful_ratio}"),
            format!("n={samples}"),
            format!("lr={learning_rate}"),
        ];
        terms.extend(base_seed.map(|base| format!("base {base}")));
        terms.push(format!("seed {seed}"));
        terms
    }

    /// Whether `words` are some of the terms, separated by commas.
    pub fn has(&self, words: &str) -> bool {
        let terms: Vec<String> = self.terms().iter().map(|term| normal(term)).collect();
        let pieces: Vec<&str> = words.split(',').collect();
        let mut rest = pieces.as_slice();
        while !rest.is_empty() {
            // A name may have commas of its own.
            let is_term = |taken: &usize| terms.contains(&normal(&rest[..*taken].join(",")));
            let Some(taken) = (1..=rest.len()).rev().find(is_term) else { return false };
            rest = &rest[taken..];
        }
        true
    }
}

/// A term so that `p=0.2`, `P 0.20` and `harmful_ratio = 0.2`, as the column is called in CSV, are one.
fn normal(term: &str) -> String {
    let word = |word: &str| word.parse::<f64>().map_or_else(|_| word.to_owned(), |number| number.to_string());
    let term = term.to_lowercase();
    let term = match term.split_once('=').map(|(name, value)| (name.trim(), value)) {
        Some(("method" | "task", value)) => value.to_owned(),
        Some(("harmful_ratio", value)) => format!("p {value}"),
        Some(("samples", value)) => format!("n {value}"),
        Some(("learning_rate", value)) => format!("lr {value}"),
        Some(("base_seed", value)) => format!("base {value}"),
        _ => term,
    };
    term.replace('=', " ").split_whitespace().map(word).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const LABEL: Label = Label {
        method: "Vaccine, strong (rho = 3)",
        task: "agnews",
        harmful_ratio: 0.2,
        samples: 500,
        learning_rate: 3e-4,
        base_seed: Some(1),
        seed: 0,
    };

    #[test]
    fn words_mean_a_cell_however_numbers_are_written() {
        assert_eq!(LABEL.to_string(), "Vaccine, strong (rho = 3), agnews, p=0.2, n=500, lr=0.0003, base 1, seed 0");
        for words in [
            &*LABEL.to_string(),
            "p=0.20",
            "P = .2, seed=0",
            "lr=3e-4",
            "seed 0, vaccine, strong (rho = 3), base=1",
            "AGNEWS",
            "method=Vaccine, strong (rho = 3), task = agnews, harmful_ratio=0.2, samples=500, learning_rate=3e-4, base_seed=1",
        ] {
            assert!(LABEL.has(words), "{words}");
        }
        for words in ["", "p=0.1", "vaccine", "strong (rho = 3)", "seed 1", "p=0.2, seed 1", "agnews,"] {
            assert!(!LABEL.has(words), "{words}");
        }
    }
}
