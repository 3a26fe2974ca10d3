//! The folder of a run's results. Several processes may be given the same one.
//!
//! Runs of one experiment share the work through the store, and each writes its results whole, one after the other, under a
//! lock: what is there at the end is of one run. A run of another experiment is refused, as it would replace the results.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use titer_core::report::Results;
use titer_core::{Error, Result};

use crate::disk::{self, Lock};
use crate::{executor::Interrupt, reporters};

/// Says whose folder it is.
const OWNER: &str = ".experiment";
/// Held by the process that writes the results.
const LOCK: &str = ".lock";
/// Stored answers.
pub(crate) const ANSWERS: &str = "answers";

/// A results folder that belongs to one experiment.
#[derive(Debug)]
pub struct OutputFolder {
    path: PathBuf,
}

impl OutputFolder {
    /// Makes the folder, or takes one that belongs to the experiment already.
    ///
    /// # Errors
    /// It belongs to another experiment, cannot be made, or the user does not want to wait.
    pub fn open(path: &Path, experiment: &str, interrupt: &Interrupt) -> Result<Self> {
        disk::make_folder(path).map_err(|error| error.help("choose another folder with --out DIR"))?;
        let folder = Self { path: path.to_owned() };
        let _lock = folder.lock(interrupt)?;
        let owner = path.join(OWNER);
        let name = if owner.exists() { disk::read(&owner)? } else { Vec::new() };
        if name.is_empty() {
            disk::replace(&owner, experiment.as_bytes())?;
        } else if name != experiment.as_bytes() {
            let other = String::from_utf8_lossy(&name);
            return Err(Error::config(format!("the folder holds results of the experiment `{other}`"))
                .file(path)
                .help("choose another folder with --out DIR, or remove this one"));
        }
        Ok(folder)
    }

    /// Writes answers, results and reports: `assemble` gives the results and writes the answers. Answers that the results do
    /// not name, those of an earlier run, are removed.
    ///
    /// # Errors
    /// A file cannot be written, or the user does not want to wait.
    pub fn write(&self, interrupt: &Interrupt, assemble: impl FnOnce(&Path) -> Result<Results>) -> Result<Results> {
        let _lock = self.lock(interrupt)?;
        let results = assemble(&self.path)?;
        reporters::write_all(&results, &self.path)?;
        let named: BTreeSet<PathBuf> =
            results.rows.iter().flat_map(|row| row.answers.values()).map(|name| self.path.join(name)).collect();
        disk::list(&self.path.join(ANSWERS))?
            .iter()
            .filter(|file| !named.contains(*file))
            .try_for_each(|file| disk::remove(file))?;
        Ok(results)
    }

    fn lock(&self, interrupt: &Interrupt) -> Result<Lock> {
        let waiting = |process: Option<u32>| {
            let process = process.map_or_else(|| "another process".to_owned(), |process| format!("process {process}"));
            tracing::warn!("waiting for {process}, which writes to {}", self.path.display());
        };
        Lock::wait(&self.path.join(LOCK), || interrupt.is_set(), waiting)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reporters::fixture;

    #[test]
    fn a_folder_belongs_to_one_experiment() {
        let folder = tempfile::tempdir().unwrap();
        let open = |name: &str| OutputFolder::open(&folder.path().join("out"), name, &Interrupt::default());
        open("one").unwrap();
        open("one").unwrap();
        let error = open("two").unwrap_err().to_string();
        assert!(error.contains("results of the experiment `one`") && error.contains("--out"), "{error}");
    }

    #[test]
    fn answers_of_an_earlier_run_go() {
        let folder = tempfile::tempdir().unwrap();
        let output = OutputFolder::open(folder.path(), "one", &Interrupt::default()).unwrap();
        let write = |file: &str| {
            let mut results = fixture::results(1);
            results.rows[0].answers.insert("harmful".into(), format!("{ANSWERS}/{file}"));
            output
                .write(&Interrupt::default(), |folder| {
                    disk::make_folder(&folder.join(ANSWERS))?;
                    disk::replace(&folder.join(ANSWERS).join(file), b"{}")?;
                    Ok(results)
                })
                .unwrap();
            disk::list(&folder.path().join(ANSWERS)).unwrap()
        };
        assert_eq!(write("a.jsonl"), [folder.path().join("answers/a.jsonl")]);
        assert_eq!(write("b.jsonl"), [folder.path().join("answers/b.jsonl")]);
    }
}
