//! Files of data sets on the hub, named as in pandas, polars and DuckDB:
//!
//! ```text
//! hf://datasets/openai/gsm8k/main/train-*.parquet          files of one folder
//! hf://datasets/nyu-mll/glue@~parquet/sst2/train           a folder: configuration and split, as the hub converts them
//! hf://datasets/stanfordnlp/sst2@8d51e7e                   all data at a commit, a tag or a branch
//! ```

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use glob::{MatchOptions, Pattern};
use titer_core::registry::did_you_mean;
use titer_core::report::HubFiles;
use titer_core::{Error, Result};

use super::{DATA_SETS, HubName, SCHEME, is_inside, is_repository, take};

/// The branch that holds every data set as Parquet, and its short name.
const CONVERTED: [&str; 2] = ["~parquet", "refs/convert/parquet"];
/// What data files end in, packed or not.
const KINDS: [&str; 7] = ["parquet", "arrow", "json", "jsonl", "ndjson", "csv", "tsv"];
const PACKED: [&str; 3] = [".gz", ".xz", ".zst"];
/// Descriptions of data sets, which are no data.
const DESCRIPTIONS: [&str; 2] = ["dataset_infos.json", "dataset_info.json"];

/// What to do where the data set has no such file.
const WRONG_REMEDY: &str = "name a file, a folder, or files by a pattern such as data/train-*.parquet; every data set is also \
                            there as Parquet at the revision ~parquet: hf://datasets/owner/name@~parquet/configuration/split";

/// Files of a data set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubData {
    name: HubName,
    /// A file, a folder, or files of one folder by a pattern; all files if it is empty.
    path: String,
}

impl HubData {
    /// The files that `text` names, if it begins with `hf://datasets/`.
    ///
    /// # Errors
    /// It goes on with no name of a data set.
    pub fn of(text: &str) -> Result<Option<Self>> {
        let Some(named) = text.strip_prefix(SCHEME).and_then(|rest| rest.strip_prefix(DATA_SETS)) else {
            return Ok(None);
        };
        let named = named.replace("%2F", "/");
        let parsed = || {
            let (owner, rest) = named.trim_end_matches('/').split_once('/')?;
            let (whole, mut path) = rest.split_once('/').unwrap_or((rest, ""));
            let (name, mut revision) =
                whole.split_once('@').map_or((whole, None), |(name, at)| (name, Some(at.to_owned())));
            // Revisions of other kinds than branches and tags have a name of three parts.
            if revision.as_deref() == Some("refs") {
                let (kind, rest) = path.split_once('/')?;
                let (which, rest) = rest.split_once('/').unwrap_or((rest, ""));
                revision = Some(format!("refs/{kind}/{which}"));
                path = rest;
            }
            let repository = format!("{owner}/{name}");
            let fits = is_repository(&repository) && (path.is_empty() || is_inside(path));
            fits.then(|| (format!("{DATA_SETS}{repository}"), revision, path.to_owned()))
        };
        let (repository, revision, path) = parsed().ok_or_else(|| {
            Error::config(format!("`{text}` names no data set of the hub"))
                .help("write hf://datasets/owner/name, hf://datasets/owner/name/file or hf://datasets/owner/name@revision/file")
        })?;
        let name = HubName { repository, revision: None, folder: None };
        let [short, whole] = CONVERTED;
        let name = match revision {
            Some(revision) if revision == short => name.at(whole)?,
            Some(revision) => name.at(&revision)?,
            None => name,
        };
        Ok(Some(Self { name, path }))
    }
}

/// Brings the files here, as far as they are not there, and says which they are and where they lie: as they were named, in the
/// folder of their commit.
///
/// # Errors
/// The data set cannot be reached, does not exist, may not be read, or has no such file; or there is no space for it.
pub fn fetch(data: &HubData) -> Result<(HubFiles, PathBuf)> {
    let choose = |names: &BTreeSet<String>, folder: &Path, remedy: &str, get: &dyn Fn(&str) -> Result<()>| {
        let files = data_files(names, &data.path);
        if files.is_empty() {
            let near = did_you_mean(&data.path, names.iter().map(String::as_str));
            let what = if data.path.is_empty() { "file of data".to_owned() } else { format!("`{}`", data.path) };
            return Err(Error::data(format!("the data set has no {what}{near}")).file(folder).help(remedy));
        }
        for file in &files {
            tracing::info!("takes {file} of {}", data.name.repository);
            get(file)?;
        }
        Ok(files)
    };
    let (files, folder) = take(&data.name, WRONG_REMEDY, choose)?;
    Ok((files, folder.join(&data.path)))
}

/// The files among `names` that `path` stands for, sorted.
fn data_files(names: &BTreeSet<String>, path: &str) -> Vec<String> {
    let literal = MatchOptions { require_literal_separator: true, ..MatchOptions::default() };
    let pattern = path.contains('*').then(|| Pattern::new(path).ok()).flatten();
    let below = |name: &str| path.is_empty() || name.strip_prefix(path).is_some_and(|rest| rest.starts_with('/'));
    let fits = |name: &str| match &pattern {
        _ if names.contains(path) => name == path,
        Some(pattern) => pattern.matches_with(name, literal),
        None => below(name) && holds_data(name),
    };
    names.iter().filter(|name| is_inside(name) && fits(name)).cloned().collect()
}

/// Whether a file of this name holds data.
fn holds_data(name: &str) -> bool {
    let plain = PACKED.iter().find_map(|packed| name.strip_suffix(packed)).unwrap_or(name);
    let file = Path::new(plain);
    let kind = file.extension().and_then(|kind| kind.to_str()).unwrap_or_default();
    KINDS.contains(&kind) && !DESCRIPTIONS.iter().any(|other| file.ends_with(other))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_other_clients() {
        for (text, repository, revision, path) in [
            ("hf://datasets/a/b", "datasets/a/b", "main", ""),
            ("hf://datasets/a/b/", "datasets/a/b", "main", ""),
            ("hf://datasets/a/b/c/d.json", "datasets/a/b", "main", "c/d.json"),
            ("hf://datasets/a/b@v1/c.json", "datasets/a/b", "v1", "c.json"),
            ("hf://datasets/a/b@~parquet/c/train", "datasets/a/b", "refs/convert/parquet", "c/train"),
            ("hf://datasets/a/b@refs/convert/parquet/c/train", "datasets/a/b", "refs/convert/parquet", "c/train"),
            ("hf://datasets/a/b@refs%2Fpr%2F1/c", "datasets/a/b", "refs/pr/1", "c"),
        ] {
            let data = HubData::of(text).unwrap().unwrap();
            assert_eq!(
                (data.name.repository.as_str(), data.name.revision(), data.path.as_str()),
                (repository, revision, path)
            );
        }
        assert_eq!(HubData::of("hf://a/b").unwrap(), None);
        assert_eq!(HubData::of("datasets/a/b").unwrap(), None);
        for wrong in [
            "hf://datasets/",
            "hf://datasets/a",
            "hf://datasets/a/b/../c",
            "hf://datasets/a/b@/c",
            "hf://datasets/../b",
        ] {
            assert!(HubData::of(wrong).unwrap_err().remedy().is_some(), "{wrong}");
        }
    }

    #[test]
    fn files_are_taken_by_name_folder_and_pattern() {
        let names = [
            "README.md",
            "data/test-0.parquet",
            "data/train-0.parquet",
            "data/x/train-1.parquet",
            "dataset_infos.json",
            "database.json",
            "raw/a.jsonl.gz",
            "../evil.json",
        ];
        let names: BTreeSet<String> = names.map(str::to_owned).into();
        let files = |path: &str| data_files(&names, path);
        assert_eq!(files("README.md"), ["README.md"]);
        assert_eq!(files("data/train-*.parquet"), ["data/train-0.parquet"]);
        assert_eq!(files("data"), ["data/test-0.parquet", "data/train-0.parquet", "data/x/train-1.parquet"]);
        assert_eq!(files("raw"), ["raw/a.jsonl.gz"]);
        assert_eq!(files("").len(), 5);
        assert_eq!(files("../evil.json"), [""; 0]);
        assert_eq!(files("dat"), [""; 0]);
    }
}
