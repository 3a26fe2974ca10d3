//! The files that a user brings, data and checkpoints, by what they contain.
//!
//! A plan holds the hash of what each stage reads, and the stage's key depends on it. A file may change before the stage
//! runs, so a stage reads through [`UserFiles`], which compares.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use titer_core::error::io_error;
use titer_core::{Error, Result};

use crate::disk;

/// The hash of files, in this order, given that of each; empty for no files.
///
/// # Errors
/// Those of `hash`.
pub fn content<'a>(files: &'a [PathBuf], mut hash: impl FnMut(&'a Path) -> Result<String>) -> Result<String> {
    if files.is_empty() {
        return Ok(String::new());
    }
    let mut whole = blake3::Hasher::new();
    for file in files {
        whole.update(hash(file)?.as_bytes());
    }
    Ok(whole.finalize().to_hex().to_string())
}

/// What tells without reading a file that it is still the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    size: u64,
    modified: Option<SystemTime>,
}

/// Files that were read, so that each is hashed once as long as its size and time stay.
#[derive(Debug, Default)]
pub struct UserFiles(Mutex<BTreeMap<PathBuf, (Stamp, String)>>);

impl UserFiles {
    /// What `read` makes of `files`, if these are what `content` is the hash of: before and after they are read, since
    /// nothing stops others from writing to them. An error names `place`, or else the files.
    ///
    /// # Errors
    /// A file is missing or is not the plan's, or `read` failed.
    pub fn read<T>(
        &self,
        place: Option<&Path>,
        files: &[PathBuf],
        content: &str,
        read: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        self.check(place, files, content)?;
        let value = read()?;
        self.check(place, files, content)?;
        Ok(value)
    }

    /// Fails if `files` are not what `content` is the hash of.
    ///
    /// # Errors
    /// A file is missing or is not the plan's.
    pub fn check(&self, place: Option<&Path>, files: &[PathBuf], content: &str) -> Result<()> {
        const REMEDY: &str = "put the former file back, or plan anew: run `titer run` again, or make the plan of `titer \
                              worker` with `titer plan CONFIG --json`";
        let found = self::content(files, |file| self.hash(file)).map_err(|error| error.help(REMEDY))?;
        if found == content {
            return Ok(());
        }
        // Which one of several files it is cannot be told from one hash of all.
        let named: Vec<String> = match place {
            Some(place) => vec![format!("`{}`", place.display())],
            None => files.iter().map(|file| format!("`{}`", file.display())).collect(),
        };
        let message = format!("the content of {} is not that of the plan: it was changed later", named.join(" or "));
        let error = Error::data(message).help(REMEDY);
        Err(match (place, files) {
            (Some(place), _) => error.file(place),
            (None, [file]) => error.file(file),
            (None, _) => error,
        })
    }

    fn hash(&self, file: &Path) -> Result<String> {
        let metadata = fs::metadata(file).map_err(|error| io_error("read", file, error))?;
        let stamp = Stamp { size: metadata.len(), modified: metadata.modified().ok() };
        if let Some((known, hash)) = self.known().get(file)
            && *known == stamp
            && stamp.modified.is_some()
        {
            return Ok(hash.clone());
        }
        let hash = disk::hash(file)?;
        self.known().insert(file.to_owned(), (stamp, hash.clone()));
        Ok(hash)
    }

    fn known(&self) -> std::sync::MutexGuard<'_, BTreeMap<PathBuf, (Stamp, String)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use titer_core::Kind;

    use super::*;
    use crate::disk::fault::{DiskWatch, Fault};

    #[test]
    fn files_are_read_only_if_they_are_those_of_the_plan() {
        let folder = tempfile::tempdir().unwrap();
        let files: Vec<PathBuf> = ["a", "b"].map(|name| folder.path().join(name)).into();
        let write = |text: &str| files.iter().for_each(|file| fs::write(file, text).unwrap());
        write("one");
        let planned = content(&files, disk::hash).unwrap();
        let (inputs, watch) = (UserFiles::default(), DiskWatch::new(folder.path(), Fault::Broken, 0));
        for _ in 0..3 {
            assert_eq!(inputs.read(None, &files, &planned, || Ok(1)).unwrap(), 1);
        }
        assert_eq!(watch.counts()["Read"], 2, "each file is hashed once");
        // Written to while it is read.
        let torn = inputs.read(None, &files, &planned, || {
            write("three");
            Ok(())
        });
        assert_eq!(torn.unwrap_err().kind(), Kind::Data);
        let mut read = false;
        let error = inputs.read(None, &files, &planned, || {
            read = true;
            Ok(())
        });
        let error = error.unwrap_err();
        assert!(!read, "it is not the plan's");
        let text = error.to_string();
        let named = files.iter().all(|file| text.contains(&format!("`{}`", file.display())));
        assert!(named && text.contains("not that of the plan") && text.contains("help: "), "{text}");
        let error = inputs.check(Some(folder.path()), &files, &planned).unwrap_err();
        assert_eq!(error.place("file"), Some(folder.path().to_str().unwrap()));
        fs::remove_file(&files[0]).unwrap();
        let error = inputs.check(None, &files, &planned).unwrap_err();
        assert!(error.kind() == Kind::Data && error.place("file") == files[0].to_str(), "{error}");
        // Data that is generated has no files.
        inputs.check(None, &[], "").unwrap();
    }
}
