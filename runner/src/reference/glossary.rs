//! The glossary: `docs/glossary.md`, which this module reads, so that the page and `titer explain` cannot differ.
//!
//! An entry is a heading of the third level, an optional line `Also:` with other names in backticks, and a text.

use super::normalized;

/// The page.
pub const PAGE: &str = include_str!("../../../docs/glossary.md");

/// An entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Term {
    /// Its name.
    pub name: &'static str,
    /// Other names of it.
    pub aliases: Vec<&'static str>,
    /// What it means, in Markdown.
    pub text: &'static str,
}

impl Term {
    /// Whether `name` is one of its names, however it is written.
    pub fn is_called(&self, name: &str) -> bool {
        let name = normalized(name);
        self.names().any(|own| normalized(own) == name)
    }

    /// The name and the others.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        std::iter::once(self.name).chain(self.aliases.iter().copied())
    }

    /// The text for a terminal: of a link only its words are left.
    pub fn plain(&self) -> String {
        let mut plain = String::new();
        let mut rest = self.text;
        while let Some((before, link)) = rest.split_once('[') {
            plain += before;
            rest = link;
            if let Some((words, (_, after))) = link.split_once("](").and_then(|(w, t)| Some((w, t.split_once(')')?))) {
                plain += words;
                rest = after;
            } else {
                plain.push('[');
            }
        }
        plain + rest
    }
}

/// All entries, in the order of the page.
pub fn terms() -> Vec<Term> {
    let entries = PAGE.split("\n### ").skip(1);
    let term = |entry: &'static str| {
        // The heading of the next section belongs to no entry.
        let entry = entry.split("\n## ").next().unwrap_or(entry);
        let (name, body) = entry.split_once('\n').unwrap_or((entry, ""));
        let body = body.trim();
        let (also, text) = match body.strip_prefix("Also:") {
            Some(rest) => rest.split_once('\n').unwrap_or((rest, "")),
            None => ("", body),
        };
        Term { name: name.trim(), aliases: also.split('`').skip(1).step_by(2).collect(), text: text.trim() }
    };
    entries.map(term).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use titer_core::report::METRICS;

    use super::*;

    fn called(name: &str) -> &'static str {
        let terms = terms();
        terms.iter().find(|term| term.is_called(name)).unwrap_or_else(|| panic!("no term `{name}`")).name
    }

    #[test]
    fn a_term_is_found_however_it_is_written() {
        for name in ["hs", "HS", "harmful_score", "harmful score", "Harmful-Score"] {
            assert_eq!(called(name), "Harmful score");
        }
        assert_eq!(called("†"), "Dagger mark");
        assert_eq!(called("±"), "Plus or minus");
        assert_eq!(called("p"), "Harmful ratio");
    }

    #[test]
    fn every_name_belongs_to_one_term_and_every_term_says_something() {
        let mut owners = BTreeMap::new();
        for term in terms() {
            assert!(term.text.len() > 40 && !term.text.contains("###"), "{term:?}");
            for name in term.names() {
                let other = owners.insert(normalized(name), term.name).filter(|other| *other != term.name);
                assert_eq!(other, None, "`{name}` also stands at {}", term.name);
            }
        }
    }

    #[test]
    fn every_metric_of_the_results_has_a_term() {
        for (name, short, _) in METRICS {
            assert_eq!(called(name), called(short));
        }
    }

    #[test]
    fn links_become_their_words() {
        let term = Term { name: "a", aliases: Vec::new(), text: "see [the page](x.md#y), `[[published]]` and [this" };
        assert_eq!(term.plain(), "see the page, `[[published]]` and [this");
        assert!(terms().iter().all(|term| !term.plain().contains("](")));
    }
}
