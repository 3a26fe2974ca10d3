//! The stage store: finished stages by key, shared by all runs.
//!
//! ```text
//! stages/<key>/…            an artifact: its files and commit.json, which lists them with size and hash
//! partial/<key>/<step>/…    checkpoints of a stage under way, newest last; the same form
//! new/<key>/…               being written; worthless after a crash
//! locks/<key>               held by the process that runs the stage
//! ```
//!
//! A folder appears under its name by one rename after everything in it is on disk, so a process killed at any moment
//! leaves either no artifact or a whole one (law 6).

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use titer_core::error::io_error;
use titer_core::{Error, Result};

use crate::plan::Key;
use crate::resolve::hash_file;

const COMMIT: &str = "commit.json";

/// The store in one folder.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

/// The commit record.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Commit {
    /// Seconds that the stage took.
    seconds: f64,
    /// Every file of the artifact by its path within it.
    files: BTreeMap<String, FileRecord>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct FileRecord {
    size: u64,
    blake3: String,
}

/// A finished stage's folder.
#[derive(Debug, Clone)]
pub struct Artifact {
    folder: PathBuf,
    commit: Commit,
}

/// The right to run a stage, held until it is dropped. No other process runs it meanwhile.
#[derive(Debug)]
pub struct Claim {
    store: Store,
    key: Key,
    /// Locked as long as it is open.
    _lock: File,
}

/// What a process finds when it wants to run a stage.
#[derive(Debug)]
pub enum Turn {
    /// Someone has run it.
    Done(Artifact),
    /// It is ours to run.
    Ours(Claim),
}

impl Store {
    /// The store in `root`, made if it does not exist.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self> {
        let store = Self { root: root.into() };
        for area in ["stages", "partial", "new", "locks"] {
            let folder = store.root.join(area);
            fs::create_dir_all(&folder).map_err(|error| {
                io_error("make the stage store", &folder, error).help("choose another place with --store DIR")
            })?;
        }
        Ok(store)
    }

    /// `TITER_CACHE_DIR`, or `titer` within the user's cache folder.
    pub fn default_root() -> PathBuf {
        let folder = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        folder("TITER_CACHE_DIR")
            .or_else(|| folder("XDG_CACHE_HOME").map(|cache| cache.join("titer")))
            .or_else(|| folder("HOME").map(|home| home.join(".cache/titer")))
            .unwrap_or_else(|| std::env::temp_dir().join("titer"))
    }

    /// The store's folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Whether the stage is finished: its record lists every file and each has its size.
    pub fn is_committed(&self, key: &Key) -> bool {
        Artifact::read(self.stage(key)).is_ok()
    }

    /// The artifact of a finished stage. Sizes are checked here, hashes when a file is asked for.
    ///
    /// # Errors
    /// The stage is not finished, or its files are damaged.
    pub fn artifact(&self, key: &Key) -> Result<Artifact> {
        Artifact::read(self.stage(key))
    }

    /// Removes a stage.
    ///
    /// # Errors
    /// The folder cannot be removed.
    pub fn discard(&self, key: &Key) -> Result<()> {
        // Renamed first, so that no reader sees half of it.
        let (folder, dying) = (self.stage(key), self.root.join("new").join(format!("{key}.discarded")));
        remove(&dying)?;
        match fs::rename(&folder, &dying) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(io_error("remove", &folder, error)),
            Ok(()) => remove(&dying),
        }
    }

    /// Waits until no other process runs the stage, then says whether it is done or ours to run. `give_up` is asked
    /// now and then while waiting.
    ///
    /// # Errors
    /// The lock cannot be used, or `give_up` said so.
    pub fn claim(&self, key: &Key, give_up: impl Fn() -> bool) -> Result<Turn> {
        let path = self.root.join("locks").join(key);
        let failed = |error| io_error("lock", &path, error);
        let lock = File::options().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
        loop {
            match lock.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if give_up() => return Err(Error::interrupted()),
                Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(100)),
                Err(TryLockError::Error(error)) => return Err(failed(error)),
            }
        }
        if let Ok(artifact) = self.artifact(key) {
            return Ok(Turn::Done(artifact));
        }
        // What lies there now is the remains of a damaged artifact or of a killed process.
        self.discard(key)?;
        let claim = Claim { store: self.clone(), key: key.clone(), _lock: lock };
        remove(&claim.folder())?;
        fs::create_dir_all(claim.folder()).map_err(|error| io_error("make", &claim.folder(), error))?;
        Ok(Turn::Ours(claim))
    }

    /// Bytes in the store.
    pub fn size(&self) -> u64 {
        fn size(folder: &Path) -> u64 {
            let entries = fs::read_dir(folder).into_iter().flatten().flatten();
            entries
                .map(
                    |entry| {
                        if entry.path().is_dir() {
                            size(&entry.path())
                        } else {
                            entry.metadata().map_or(0, |m| m.len())
                        }
                    },
                )
                .sum()
        }
        size(&self.root)
    }

    fn stage(&self, key: &Key) -> PathBuf {
        self.root.join("stages").join(key)
    }
}

impl Artifact {
    fn read(folder: PathBuf) -> Result<Self> {
        let path = folder.join(COMMIT);
        let bytes = fs::read(&path).map_err(|error| io_error("read the commit record", &path, error))?;
        let commit: Commit =
            serde_json::from_slice(&bytes).map_err(|error| damaged(&path, "its record is unreadable").source(error))?;
        for (name, record) in &commit.files {
            let path = folder.join(name);
            let size = fs::metadata(&path).map(|metadata| metadata.len());
            if !matches!(size, Ok(size) if size == record.size) {
                return Err(damaged(&path, "a file is missing or has another size than its record says"));
            }
        }
        Ok(Self { folder, commit })
    }

    /// The folder, unchecked beyond sizes.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The path of one file, after its hash was checked.
    ///
    /// # Errors
    /// There is no such file, or it is damaged.
    pub fn file(&self, name: &str) -> Result<PathBuf> {
        let path = self.folder.join(name);
        let record = self
            .commit
            .files
            .get(name)
            .ok_or_else(|| Error::data(format!("the stage has no file `{name}`")).file(&path))?;
        if hash_file(&path)? == record.blake3 {
            return Ok(path);
        }
        // Without its record the stage counts as missing, so the next run computes it anew.
        let _ = fs::remove_file(self.folder.join(COMMIT));
        Err(damaged(&path, "its content is not what its record says"))
    }

    /// Seconds that the stage took, without what an interrupted run did before.
    pub fn seconds(&self) -> f64 {
        self.commit.seconds
    }

    /// Whether the stage wrote a file of that name.
    pub fn has(&self, name: &str) -> bool {
        self.commit.files.contains_key(name)
    }

    /// Checks the hash of every file that results are made of: all but weights, which are checked when they are read.
    ///
    /// # Errors
    /// A file is damaged.
    pub fn check_records(&self) -> Result<()> {
        let mut records = self.commit.files.keys().filter(|name| !name.ends_with(".safetensors"));
        records.try_for_each(|name| self.file(name).map(drop))
    }

    /// The folder, after the hash of every file was checked.
    ///
    /// # Errors
    /// A file is damaged.
    pub fn verified(&self) -> Result<&Path> {
        self.commit.files.keys().try_for_each(|name| self.file(name).map(drop))?;
        Ok(&self.folder)
    }
}

impl Claim {
    /// The folder that the stage writes its files to.
    pub fn folder(&self) -> PathBuf {
        self.store.root.join("new").join(&self.key)
    }

    /// The stage's checkpoints.
    pub fn partials(&self) -> Partials {
        Partials { folder: self.store.root.join("partial").join(&self.key) }
    }

    /// Makes the folder the stage's artifact, which took `seconds`, and drops its checkpoints.
    ///
    /// # Errors
    /// The files cannot be brought to disk.
    pub fn commit(self, seconds: f64) -> Result<Artifact> {
        let target = self.store.stage(&self.key);
        publish(&self.folder(), &target, seconds)?;
        remove(&self.partials().folder)?;
        Artifact::read(target)
    }
}

/// The checkpoints of a stage under way.
#[derive(Debug, Clone)]
pub struct Partials {
    folder: PathBuf,
}

impl Partials {
    /// Keeps a checkpoint: `write` fills a folder. Older ones are removed once it is safe.
    ///
    /// # Errors
    /// The checkpoint cannot be written.
    pub fn save(&self, step: usize, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let (unfinished, target) = (self.folder.join("new"), self.folder.join(format!("{step:012}")));
        remove(&unfinished)?;
        fs::create_dir_all(&unfinished).map_err(|error| io_error("make", &unfinished, error))?;
        write(&unfinished)?;
        remove(&target)?;
        publish(&unfinished, &target, 0.)?;
        self.steps().into_iter().filter(|&(other, _)| other != step).try_for_each(|(_, folder)| remove(&folder))
    }

    /// The newest whole checkpoint: its step and its folder. A damaged one is passed over.
    pub fn newest(&self) -> Option<(usize, PathBuf)> {
        self.steps().into_iter().rev().find(|(_, folder)| {
            Artifact::read(folder.clone()).and_then(|artifact| artifact.verified().map(drop)).is_ok()
        })
    }

    fn steps(&self) -> Vec<(usize, PathBuf)> {
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let mut steps: Vec<_> =
            entries.filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path()))).collect();
        steps.sort();
        steps
    }
}

/// Brings everything in `folder` to disk, records it and renames it to `target`.
fn publish(folder: &Path, target: &Path, seconds: f64) -> Result<()> {
    let mut commit = Commit { seconds, ..Commit::default() };
    record(folder, "", &mut commit)?;
    let bytes = serde_json::to_vec_pretty(&commit).expect("records serialise");
    write_file(&folder.join(COMMIT), &bytes)?;
    sync(folder)?;
    fs::rename(folder, target).map_err(|error| io_error("rename into place", target, error))?;
    target.parent().map_or(Ok(()), sync)
}

fn record(folder: &Path, prefix: &str, commit: &mut Commit) -> Result<()> {
    let failed = |error| io_error("read", folder, error);
    for entry in fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().and_then(std::ffi::OsStr::to_str);
        let name = name.ok_or_else(|| Error::run("an artifact file has a name that is not Unicode").file(&path))?;
        let name = format!("{prefix}{name}");
        if path.is_dir() {
            record(&path, &format!("{name}/"), commit)?;
        } else {
            let size = fs::metadata(&path).map_err(failed)?.len();
            commit.files.insert(name, FileRecord { size, blake3: hash_file(&path)? });
        }
        sync(&path)?;
    }
    Ok(())
}

/// Writes a file whole: under another name, synced, then renamed.
///
/// # Errors
/// The file cannot be written.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let failed = |error| io_error("write", path, error);
    let unfinished = path.with_added_extension("new");
    let mut file = File::create(&unfinished).map_err(failed)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(failed)?;
    fs::rename(&unfinished, path).map_err(failed)
}

fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).map_err(|error| io_error("sync", path, error))
}

fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(io_error("remove", folder, error)),
        _ => Ok(()),
    }
}

fn damaged(path: &Path, why: &str) -> Error {
    Error::data(format!("a stored artifact is damaged: {why}"))
        .file(path)
        .help("run the same command again: the damaged stage is computed anew")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        (folder, store)
    }

    fn claim(store: &Store, key: &str) -> Claim {
        match store.claim(&key.to_owned(), || false).unwrap() {
            Turn::Ours(claim) => claim,
            Turn::Done(_) => panic!("`{key}` is done"),
        }
    }

    fn finish(store: &Store, key: &str) -> Artifact {
        let claim = claim(store, key);
        fs::create_dir(claim.folder().join("sub")).unwrap();
        fs::write(claim.folder().join("a.txt"), "one").unwrap();
        fs::write(claim.folder().join("sub/b.txt"), "two").unwrap();
        claim.commit(1.).unwrap()
    }

    #[test]
    fn an_artifact_appears_whole() {
        let (_folder, store) = store();
        let key = "k".to_owned();
        let claim = claim(&store, "k");
        fs::write(claim.folder().join("a.txt"), "one").unwrap();
        assert!(!store.is_committed(&key));
        let artifact = claim.commit(1.).unwrap();
        assert!(store.is_committed(&key));
        assert_eq!(fs::read_to_string(artifact.file("a.txt").unwrap()).unwrap(), "one");
        assert!(artifact.file("b.txt").is_err());
        assert!(matches!(store.claim(&key, || false).unwrap(), Turn::Done(_)));
    }

    #[test]
    fn a_killed_process_leaves_nothing_behind() {
        let (_folder, store) = store();
        let dead = claim(&store, "k");
        fs::write(dead.folder().join("half.txt"), "ha").unwrap();
        drop(dead);
        // Also as if it had died while its folder was being removed or its record written.
        fs::create_dir_all(store.stage(&"k".to_owned())).unwrap();
        assert!(!store.is_committed(&"k".to_owned()));
        let files: Vec<_> = finish(&store, "k").commit.files.into_keys().collect();
        assert_eq!(files, ["a.txt", "sub/b.txt"]);
    }

    #[test]
    fn damage_is_found_and_computed_anew() {
        let (_folder, store) = store();
        let key = "k".to_owned();
        let artifact = finish(&store, "k");
        fs::write(artifact.folder().join("a.txt"), "eno").unwrap();
        assert!(store.is_committed(&key), "sizes agree");
        assert!(artifact.verified().unwrap_err().to_string().contains("damaged"));
        assert!(!store.is_committed(&key), "found damaged, it counts as missing");
        let artifact = finish(&store, "k");
        fs::write(artifact.folder().join("a.txt"), "longer").unwrap();
        assert!(!store.is_committed(&key));
        finish(&store, "k").verified().unwrap();
        fs::remove_file(store.stage(&key).join("sub/b.txt")).unwrap();
        assert!(!store.is_committed(&key));
        fs::write(finish(&store, "k").folder().join(COMMIT), "{").unwrap();
        assert!(!store.is_committed(&key));
    }

    #[test]
    fn the_newest_whole_checkpoint_wins() {
        let (_folder, store) = store();
        let claim = claim(&store, "k");
        let partials = claim.partials();
        let save = |step, text: &str| {
            partials.save(step, |folder| write_file(&folder.join("w.txt"), text.as_bytes())).unwrap();
        };
        assert!(partials.newest().is_none());
        save(10, "ten");
        // A later one that was cut short, and one whose file rotted.
        fs::create_dir_all(partials.folder.join("000000000030")).unwrap();
        fs::create_dir_all(partials.folder.join("new")).unwrap();
        assert_eq!(partials.newest().map(|(step, _)| step), Some(10));
        save(20, "twenty");
        let (step, folder) = partials.newest().unwrap();
        assert_eq!((step, fs::read_to_string(folder.join("w.txt")).unwrap().as_str()), (20, "twenty"));
        assert_eq!(partials.steps().len(), 1, "older ones are gone");
        fs::write(folder.join("w.txt"), "twentx").unwrap();
        assert!(partials.newest().is_none());
        claim.commit(1.).unwrap();
        assert!(!partials.folder.exists());
    }

    #[test]
    fn a_failed_checkpoint_keeps_the_last_one() {
        let (_folder, store) = store();
        let partials = claim(&store, "k").partials();
        partials.save(1, |_| Ok(())).unwrap();
        partials.save(2, |_| Err(Error::run("disk full"))).unwrap_err();
        assert_eq!(partials.newest().map(|(step, _)| step), Some(1));
    }

    #[test]
    fn the_second_process_waits_and_reuses() {
        let (_folder, store) = store();
        let key = "k".to_owned();
        let first = claim(&store, "k");
        assert_eq!(store.claim(&key, || true).unwrap_err().kind(), titer_core::Kind::Interrupted);
        std::thread::scope(|scope| {
            let second = scope.spawn(|| matches!(store.claim(&key, || false), Ok(Turn::Done(_))));
            std::thread::sleep(Duration::from_millis(50));
            first.commit(1.).unwrap();
            assert!(second.join().unwrap());
        });
    }
}
