//! The folder of a run's results. Several processes may be given the same one.
//!
//! Runs of one experiment share the work through the store, and each writes its results whole, one after the other, under a
//! lock: what is there at the end is of one run. A run of another experiment is refused, as it would replace the results.
//! Results of the same experiment give way only to such as hold all their rows again, as when seeds are added; others, as
//! of another configuration, are kept in a folder of their own within this one.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use titer_core::report::{ResultRow, Results};
use titer_core::{Error, Result};

use crate::disk::{self, Lock};
use crate::results::metrics_hash;
use crate::{executor::Interrupt, reporters};

/// Says whose folder it is.
const OWNER: &str = ".experiment";
/// Held by the process that writes the results.
const LOCK: &str = ".lock";
/// Before the hash in the name of a folder of former results.
const FORMER: &str = "former-";
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
    /// not name, those of an earlier run, are removed. If not all rows of former results are made `again`, these are kept;
    /// where, is returned with the new ones.
    ///
    /// # Errors
    /// A file cannot be written, or the user does not want to wait.
    pub fn write(
        &self,
        interrupt: &Interrupt,
        again: impl Fn(&ResultRow) -> bool,
        assemble: impl FnOnce(&Path) -> Result<Results>,
    ) -> Result<(Results, Option<PathBuf>)> {
        let _lock = self.lock(interrupt)?;
        let former = self.set_aside(again)?;
        let results = assemble(&self.path)?;
        reporters::write_all(&results, &self.path)?;
        let named: BTreeSet<PathBuf> =
            results.rows.iter().flat_map(|row| row.answers.values()).map(|name| self.path.join(name)).collect();
        disk::list(&self.path.join(ANSWERS))?
            .iter()
            .filter(|file| !named.contains(*file))
            .try_for_each(|file| disk::remove(file))?;
        Ok((results, former))
    }

    /// Moves results of which not all rows are made again, or that cannot be read, into a folder that is named by a hash of
    /// them.
    fn set_aside(&self, again: impl Fn(&ResultRow) -> bool) -> Result<Option<PathBuf>> {
        let results = self.path.join(reporters::RESULTS);
        if !results.exists() {
            return Ok(None);
        }
        let hash = match reporters::load(&self.path) {
            Ok(former) if former.rows.iter().all(again) => return Ok(None),
            Ok(former) => metrics_hash(&former.rows),
            // They may be of a newer version.
            Err(_) => disk::hash(&results)?,
        };
        let folder = self.path.join(format!("{FORMER}{}", &hash[..8]));
        disk::make_folder(&folder)?;
        // The results go last: if this is interrupted, the next run goes on. What is there already has the same numbers.
        let files = [ANSWERS].into_iter().chain(reporters::FILES.iter().rev().map(|(name, _)| *name));
        for (from, to) in files.map(|name| (self.path.join(name), folder.join(name))) {
            if from.exists() && !to.exists() {
                disk::rename(&from, &to)?;
            }
        }
        Ok(Some(folder))
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
                .write(
                    &Interrupt::default(),
                    |_| true,
                    |folder| {
                        disk::make_folder(&folder.join(ANSWERS))?;
                        disk::replace(&folder.join(ANSWERS).join(file), b"{}")?;
                        Ok(results)
                    },
                )
                .unwrap();
            disk::list(&folder.path().join(ANSWERS)).unwrap()
        };
        assert_eq!(write("a.jsonl"), [folder.path().join("answers/a.jsonl")]);
        assert_eq!(write("b.jsonl"), [folder.path().join("answers/b.jsonl")]);
    }

    #[test]
    fn results_that_are_not_made_again_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let output = OutputFolder::open(folder.path(), "one", &Interrupt::default()).unwrap();
        let write = |results: &Results| {
            let again = |row: &ResultRow| results.rows.iter().any(|new| new.id == row.id);
            let assemble = |folder: &Path| {
                disk::make_folder(&folder.join(ANSWERS))?;
                let name = &results.rows[0].answers["harmful"];
                disk::replace(&folder.join(name), results.experiment.as_bytes())?;
                Ok(results.clone())
            };
            output.write(&Interrupt::default(), again, assemble).unwrap().1
        };
        let results = |experiment: &str, seeds| {
            let mut results = fixture::results(seeds);
            results.experiment = experiment.into();
            results.rows[0].answers.insert("harmful".into(), format!("{ANSWERS}/a.jsonl"));
            results
        };
        let (one, more) = (results("one", 1), results("more", 2));
        let mut other = results("other", 1);
        other.rows.iter_mut().for_each(|row| row.id += "-other");
        assert_eq!(write(&one), None, "nothing was there");
        assert_eq!(write(&more), None, "all rows are there again");
        let kept = write(&other).expect("rows would be lost");
        assert_eq!(reporters::load(&kept).unwrap(), more);
        assert_eq!(std::fs::read_to_string(kept.join(ANSWERS).join("a.jsonl")).unwrap(), "more");
        assert_eq!(reporters::load(folder.path()).unwrap(), other);
        // What cannot be read is kept as it is.
        std::fs::write(folder.path().join(reporters::RESULTS), "{\"schema\": 9}").unwrap();
        let unread = write(&other).expect("no one knows its rows");
        assert_eq!(std::fs::read_to_string(unread.join(reporters::RESULTS)).unwrap(), "{\"schema\": 9}");
        // A move that was interrupted goes on.
        let half = folder.path().join(format!("{FORMER}{}", &metrics_hash(&other.rows)[..8]));
        disk::make_folder(&half).unwrap();
        disk::rename(&folder.path().join(ANSWERS), &half.join(ANSWERS)).unwrap();
        // Once more: the other's are kept beside them, and the first are there already.
        let kept_other = write(&more).expect("rows would be lost");
        assert_eq!(kept_other, half);
        assert_eq!(reporters::load(&kept_other).unwrap(), other);
        assert_eq!(write(&other), Some(kept));
    }
}
