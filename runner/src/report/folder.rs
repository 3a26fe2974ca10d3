//! The folder of a run's results. Several processes may be given the same one.
//!
//! Runs of one experiment share the work through the store, and each writes its results whole, one after the other, under a
//! lock: what is there at the end is of one run. A run of another experiment is refused, as it would replace the results.
//! Results of the same experiment give way only to such as hold all their rows again, as when seeds are added; others, as
//! of another configuration, are kept in a folder of their own within this one. An interrupted run writes what it has
//! unless that would take former rows away. Which rows there are again is known only once they are assembled, so that their
//! answers wait in a folder of their own until it is decided what becomes of the former ones.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::json;
use titer_core::report::{ResultRow, Results};
use titer_core::{Error, Result};

use crate::disk;
use crate::disk::Lock;
use crate::interrupt::Interrupt;
use crate::manifest::digest;
use crate::report;
use crate::results::ANSWERS_FOLDER;
use crate::results::file::{RESULTS, load};

/// Says whose folder it is.
const OWNER: &str = ".experiment";
/// Held by the process that writes the results.
const LOCK: &str = ".lock";
/// Before the hash in the name of a folder of former results.
const FORMER: &str = "former-";
/// Answers of rows that are being assembled; worthless after a crash.
const NEW: &str = ".new";

/// A results folder that belongs to one experiment.
#[derive(Debug)]
pub struct OutputFolder {
    path: PathBuf,
}

impl OutputFolder {
    /// Makes the folder, or takes one that belongs to the experiment already.
    ///
    /// # Errors
    /// It belongs to another experiment, holds files of the same names that no run has written, cannot be made, or the user
    /// does not want to wait.
    pub fn open(path: &Path, experiment: &str, interrupt: &Interrupt) -> Result<Self> {
        disk::make_folder(path).map_err(|error| error.help("choose another folder with --out DIR"))?;
        let folder = Self { path: path.to_owned() };
        let _lock = folder.lock(interrupt)?;
        let owner = path.join(OWNER);
        let name = if owner.exists() { disk::read(&owner)? } else { Vec::new() };
        if name.is_empty() {
            let files = report::FILES.iter().map(|(name, _)| *name).chain([ANSWERS_FOLDER]);
            if let Some(file) = files.into_iter().find(|name| path.join(name).exists()) {
                return Err(Error::config(format!(
                    "the folder holds `{file}`, which no run has written, and a run would replace"
                ))
                .file(path)
                .help("choose another folder with --out DIR, or move that file"));
            }
            disk::replace(&owner, experiment.as_bytes())?;
        } else if name != experiment.as_bytes() {
            let other = String::from_utf8_lossy(&name);
            return Err(Error::config(format!("the folder holds results of the experiment `{other}`"))
                .file(path)
                .help("choose another folder with --out DIR, or remove this one"));
        }
        Ok(folder)
    }

    /// Writes answers, results and reports: `assemble` gives the results and writes the answers into the folder that it is
    /// given. Answers that former results name and these do not are removed. If these do not hold all rows of former
    /// results again, the former are kept, and a warning says where.
    ///
    /// # Errors
    /// A file cannot be written, or the user does not want to wait.
    pub fn write(&self, interrupt: &Interrupt, assemble: impl FnOnce(&Path) -> Result<Results>) -> Result<Results> {
        let _lock = self.lock(interrupt)?;
        let results = self.assemble(assemble)?;
        let former = self.set_aside(&results)?;
        self.replace(former.as_ref(), results)
    }

    /// The same for a run that was interrupted: its results are written only if they hold all rows of former results again.
    /// Others stay where they are, and nothing is returned.
    ///
    /// # Errors
    /// As [`OutputFolder::write`].
    pub fn write_partial(
        &self,
        interrupt: &Interrupt,
        assemble: impl FnOnce(&Path) -> Result<Results>,
    ) -> Result<Option<Results>> {
        let _lock = self.lock(interrupt)?;
        let results = self.assemble(assemble)?;
        let former = match self.path.join(RESULTS).exists().then(|| load(&self.path)) {
            None => None,
            Some(Ok(former)) if holds_again(&results, &former) => Some(former),
            Some(_) => {
                disk::remove(&self.path.join(NEW))?;
                return Ok(None);
            }
        };
        self.replace(former.as_ref(), results).map(Some)
    }

    /// The results, with their answers in [`NEW`].
    fn assemble(&self, assemble: impl FnOnce(&Path) -> Result<Results>) -> Result<Results> {
        let new = self.path.join(NEW);
        disk::remove(&new)?;
        disk::make_folder(&new.join(ANSWERS_FOLDER))?;
        assemble(&new)
    }

    fn replace(&self, former: Option<&Results>, results: Results) -> Result<Results> {
        let (new, ours) = (self.path.join(NEW), answers(&results));
        disk::make_folder(&self.path.join(ANSWERS_FOLDER))?;
        ours.iter().try_for_each(|name| disk::rename(&new.join(name), &self.path.join(name)))?;
        disk::sync(&self.path.join(ANSWERS_FOLDER))?;
        disk::remove(&new)?;
        report::write_all(&results, &self.path)?;
        // What else lies among the answers is not ours.
        let former = former.map_or_else(BTreeSet::new, answers);
        let gone = former.difference(&ours).map(|name| self.path.join(name)).collect::<Vec<_>>();
        gone.iter().filter(|file| file.exists()).try_for_each(|file| disk::remove(file))?;
        Ok(results)
    }

    /// Moves results whose rows `results` do not all hold again, or that cannot be read, into a folder that is named by a
    /// hash of them. Others are returned.
    fn set_aside(&self, results: &Results) -> Result<Option<Results>> {
        let path = self.path.join(RESULTS);
        if !path.exists() {
            return Ok(None);
        }
        let hash = match load(&self.path) {
            Ok(former) if holds_again(results, &former) => return Ok(Some(former)),
            // Of whole rows: their metrics alone may be equal by chance.
            Ok(former) => digest(&json!(former.rows)),
            // They may be of a newer version.
            Err(_) => disk::hash(&path)?,
        };
        let folder = self.path.join(format!("{FORMER}{}", &hash[..8]));
        // Said before anything moves: if the run fails from here on, nothing else tells where the results are.
        tracing::warn!(
            "the folder holds results that are not all part of this run; they are kept in {}",
            folder.display()
        );
        disk::make_folder(&folder)?;
        // The results go last: if this is interrupted, the next run goes on. What is there already is the same.
        let files = [ANSWERS_FOLDER].into_iter().chain(report::FILES.iter().rev().map(|(name, _)| *name));
        for (from, to) in files.map(|name| (self.path.join(name), folder.join(name))) {
            if from.exists() && !to.exists() {
                disk::rename(&from, &to)?;
            }
        }
        Ok(None)
    }

    fn lock(&self, interrupt: &Interrupt) -> Result<Lock> {
        let waiting = |process: Option<u32>| {
            let process = process.map_or_else(|| "another process".to_owned(), |process| format!("process {process}"));
            tracing::warn!("waiting for {process}, which writes to {}", self.path.display());
        };
        Lock::wait(&self.path.join(LOCK), || interrupt.is_set(), waiting)
    }
}

/// Whether results hold every row of former ones again: the same measurement, which another judge may have joined.
fn holds_again(results: &Results, former: &Results) -> bool {
    let rows: BTreeMap<&str, &ResultRow> = results.rows.iter().map(|row| (row.id.as_str(), row)).collect();
    let is_again = |row: &ResultRow| {
        let ours = rows.get(row.id.as_str()).map(|ours| &ours.artifacts);
        ours.is_some_and(|ours| row.artifacts.iter().all(|(what, key)| ours.get(what) == Some(key)))
    };
    former.rows.iter().all(is_again)
}

/// The files of answers that results name.
fn answers(results: &Results) -> BTreeSet<String> {
    results.rows.iter().flat_map(|row| row.answers.values()).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::fixture;

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
            results.rows[0].answers.insert("harmful".into(), format!("{ANSWERS_FOLDER}/{file}"));
            let assemble = |folder: &Path| {
                disk::replace(&folder.join(ANSWERS_FOLDER).join(file), b"{}")?;
                Ok(results)
            };
            output.write(&Interrupt::default(), assemble).unwrap();
            disk::list(&folder.path().join(ANSWERS_FOLDER)).unwrap()
        };
        assert_eq!(write("a.jsonl"), [folder.path().join("answers/a.jsonl")]);
        assert_eq!(write("b.jsonl"), [folder.path().join("answers/b.jsonl")]);
        // Files of the user's own stay.
        std::fs::write(folder.path().join("answers/notes.csv"), "mine").unwrap();
        assert_eq!(
            write("c.jsonl"),
            ["c.jsonl", "notes.csv"].map(|name| folder.path().join(ANSWERS_FOLDER).join(name))
        );
    }

    #[test]
    fn a_folder_with_files_of_the_same_names_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("report.md"), "mine").unwrap();
        let error = OutputFolder::open(folder.path(), "one", &Interrupt::default()).unwrap_err().to_string();
        assert!(error.contains("holds `report.md`, which no run has written") && error.contains("--out"), "{error}");
    }

    #[test]
    fn results_that_are_not_made_again_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let output = OutputFolder::open(folder.path(), "one", &Interrupt::default()).unwrap();
        let former = || -> Vec<PathBuf> {
            let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with(FORMER);
            disk::list(folder.path()).unwrap().into_iter().filter(name).collect()
        };
        // Where results are that were set aside, if the place is new.
        let write = |results: &Results| {
            let assemble = |folder: &Path| {
                let name = &results.rows[0].answers["harmful"];
                disk::replace(&folder.join(name), results.experiment.as_bytes())?;
                Ok(results.clone())
            };
            let before = former();
            output.write(&Interrupt::default(), assemble).unwrap();
            former().into_iter().find(|folder| !before.contains(folder))
        };
        let results = |experiment: &str, seeds| {
            let mut results = fixture::results(seeds);
            results.experiment = experiment.into();
            results.rows[0].answers.insert("harmful".into(), format!("{ANSWERS_FOLDER}/a.jsonl"));
            results
        };
        let (one, more) = (results("one", 1), results("more", 2));
        let mut other = results("other", 1);
        other.rows.iter_mut().for_each(|row| row.id += "-other");
        assert_eq!(write(&one), None, "nothing was there");
        assert_eq!(write(&more), None, "all rows are there again");
        let kept = write(&other).expect("rows would be lost");
        assert_eq!(load(&kept).unwrap(), more);
        assert_eq!(std::fs::read_to_string(kept.join(ANSWERS_FOLDER).join("a.jsonl")).unwrap(), "more");
        assert_eq!(load(folder.path()).unwrap(), other);
        // What cannot be read is kept as it is.
        std::fs::write(folder.path().join(RESULTS), "{\"schema\": 9}").unwrap();
        let unread = write(&other).expect("no one knows its rows");
        assert_eq!(std::fs::read_to_string(unread.join(RESULTS)).unwrap(), "{\"schema\": 9}");
        // A move that was interrupted goes on.
        let half = folder.path().join(format!("{FORMER}{}", &digest(&json!(other.rows))[..8]));
        disk::make_folder(&half).unwrap();
        disk::rename(&folder.path().join(ANSWERS_FOLDER), &half.join(ANSWERS_FOLDER)).unwrap();
        assert_eq!(write(&more), None);
        assert_eq!(load(&half).unwrap(), other);
        // The same results once more are kept already.
        assert_eq!(write(&other), None);
        assert_eq!(load(folder.path()).unwrap(), other);
        // An interrupted run takes nothing away: not from others, and not from what cannot be read.
        let partial = |rows: &Results| {
            let assemble = |folder: &Path| {
                disk::replace(&folder.join(&rows.rows[0].answers["harmful"]), b"{}")?;
                Ok(rows.clone())
            };
            output.write_partial(&Interrupt::default(), assemble).unwrap()
        };
        write(&more);
        let before = former();
        assert_eq!(partial(&one), None);
        assert_eq!(partial(&other), None);
        assert_eq!((load(folder.path()).unwrap(), former()), (more.clone(), before.clone()));
        assert_eq!(partial(&more), Some(more.clone()));
        std::fs::write(folder.path().join(RESULTS), "{\"schema\": 9}").unwrap();
        assert_eq!(partial(&more), None);
        std::fs::remove_file(folder.path().join(RESULTS)).unwrap();
        // Where there is nothing, it writes, and a later run goes over it.
        assert_eq!(partial(&one), Some(one.clone()));
        assert_eq!(write(&more), None);
        assert_eq!((load(folder.path()).unwrap(), former()), (more.clone(), before));
        // Equal metrics of other artifacts are other results.
        let mut rebuilt = more.clone();
        rebuilt.rows[0].artifacts.insert("align".into(), "rebuilt".into());
        assert_eq!(write(&rebuilt), None, "the other's are kept already");
        assert!(write(&one).is_some_and(|kept| load(&kept).unwrap() == rebuilt));
    }
}
