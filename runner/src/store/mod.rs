//! The stage store: finished stages by key, shared by all runs.
//!
//! ```text
//! stages/<key>/…            an artifact: its files and commit.json, which names the key and lists them with size and hash
//! partial/<key>/<step>/…    checkpoints of a stage under way, newest last; the same form
//! new/<key>/…               being written; worthless after a crash
//! locks/<key>               held by the process that runs the stage
//! ```
//!
//! A folder appears under its name by one rename after everything in it is on disk, so a process killed at any moment
//! leaves either no artifact or a whole one (law 6). Several processes may use one store: whatever belongs to a key is
//! written and removed by the holder of its lock alone, and reading takes no lock.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use titer_core::error::io_error;
use titer_core::{Error, Result};

use crate::disk;
use crate::disk::Lock;

/// The identity of a stage: the hash of its manifest.
pub type Key = String;

const COMMIT: &str = "commit.json";

/// The store in one folder.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

/// The commit record.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Commit {
    /// The key of the artifact, or that of the stage and the step of the checkpoint. A folder under another name is refused.
    key: String,
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
    _lock: Lock,
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
            let made = disk::make_folder(&store.root.join(area));
            made.map_err(|error| error.help("make room or choose another place for the store with --store DIR"))?;
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
        self.artifact(key).is_ok()
    }

    /// The artifact of a finished stage. Sizes are checked here, hashes when a file is asked for.
    ///
    /// # Errors
    /// The stage is not finished, or its files are damaged.
    pub fn artifact(&self, key: &Key) -> Result<Artifact> {
        Artifact::read(self.stage(key), key)
    }

    /// Waits until no other process runs the stage, then says whether it is done, to the last byte, or ours to run.
    /// `give_up` and `waiting` are those of [`Lock::wait`].
    ///
    /// # Errors
    /// The lock cannot be used, what lies in the way cannot be removed, or `give_up` said so.
    pub fn claim(&self, key: &Key, give_up: impl Fn() -> bool, waiting: impl FnOnce(Option<u32>)) -> Result<Turn> {
        let lock = Lock::wait(&self.lock(key), give_up, waiting)?;
        if let Ok(artifact) = self.artifact(key)
            && artifact.verified().is_ok()
        {
            return Ok(Turn::Done(artifact));
        }
        // What lies there now is the remains of a killed process, a damaged artifact or that of another key.
        let claim = Claim { store: self.clone(), key: key.clone(), _lock: lock };
        disk::remove(&claim.folder())?;
        if self.stage(key).exists() {
            // Renamed first, so that no reader sees half of it.
            disk::rename(&self.stage(key), &claim.folder())?;
            disk::remove(&claim.folder())?;
        }
        disk::make_folder(&claim.folder())?;
        Ok(Turn::Ours(claim))
    }

    /// Removes the checkpoints of stages that are finished, which a process leaves that is killed right after it committed
    /// one. Those that another process works on are left to it.
    pub fn sweep(&self, finished: &BTreeSet<Key>) {
        for checkpoints in disk::list(&self.root.join("partial")).unwrap_or_default() {
            let key = checkpoints.file_name().and_then(|name| name.to_str()).and_then(|name| finished.get(name));
            let Some(key) = key else { continue };
            let Ok(_lock) = Lock::wait(&self.lock(key), || true, |_| ()) else { continue };
            if self.is_committed(key)
                && let Err(error) = disk::remove(&checkpoints)
            {
                stays(&error);
            }
        }
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

    fn lock(&self, key: &Key) -> PathBuf {
        self.root.join("locks").join(key)
    }
}

impl Artifact {
    fn read(folder: PathBuf, key: &str) -> Result<Self> {
        let path = folder.join(COMMIT);
        let commit: Commit = serde_json::from_slice(&disk::read(&path)?)
            .map_err(|error| damaged(&path, "its record is unreadable").source(error))?;
        if commit.key != key {
            return Err(damaged(&path, &format!("it belongs to `{}`", commit.key)).key(key));
        }
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
        if disk::hash(&path)? == record.blake3 {
            return Ok(path);
        }
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
        Partials { folder: self.store.root.join("partial").join(&self.key), key: self.key.clone() }
    }

    /// Makes the folder the stage's artifact, which took `seconds`, and drops its checkpoints.
    ///
    /// # Errors
    /// The files cannot be brought to disk.
    pub fn commit(self, seconds: f64) -> Result<Artifact> {
        publish(&self.folder(), &self.store.stage(&self.key), &self.key, seconds)?;
        if let Err(error) = disk::remove(&self.partials().folder) {
            stays(&error);
        }
        self.store.artifact(&self.key)
    }
}

/// The checkpoints of a stage under way.
#[derive(Debug, Clone)]
pub struct Partials {
    folder: PathBuf,
    key: Key,
}

impl Partials {
    /// Keeps a checkpoint: `write` fills a folder. Older ones are removed once it is safe.
    ///
    /// # Errors
    /// The checkpoint cannot be written.
    pub fn save(&self, step: usize, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let (unfinished, target) = (self.folder.join("new"), self.folder.join(format!("{step:012}")));
        disk::remove(&unfinished)?;
        disk::make_folder(&unfinished)?;
        write(&unfinished)?;
        disk::remove(&target)?;
        publish(&unfinished, &target, &self.record_key(step), 0.)?;
        self.steps().into_iter().filter(|&(other, _)| other != step).try_for_each(|(_, folder)| disk::remove(&folder))
    }

    /// The newest whole checkpoint: its step and its folder. A damaged one is passed over.
    pub fn newest(&self) -> Option<(usize, PathBuf)> {
        self.steps().into_iter().rev().find(|(step, folder)| {
            let artifact = Artifact::read(folder.clone(), &self.record_key(*step));
            artifact.and_then(|artifact| artifact.verified().map(drop)).is_ok()
        })
    }

    fn steps(&self) -> Vec<(usize, PathBuf)> {
        let step = |folder: &Path| folder.file_name()?.to_str()?.parse().ok();
        let folders = disk::list(&self.folder).unwrap_or_default().into_iter();
        folders.filter_map(|folder| Some((step(&folder)?, folder))).collect()
    }

    fn record_key(&self, step: usize) -> String {
        format!("{} at {step}", self.key)
    }
}

/// Brings everything in `folder` to disk, records it as that of `key` and renames it to `target`.
fn publish(folder: &Path, target: &Path, key: &str, seconds: f64) -> Result<()> {
    let mut commit = Commit { key: key.to_owned(), seconds, ..Commit::default() };
    record(folder, "", &mut commit)?;
    let bytes = serde_json::to_vec_pretty(&commit).expect("records serialise");
    let path = folder.join(COMMIT);
    disk::write(&path, &bytes)?;
    disk::sync(&path)?;
    disk::sync(folder)?;
    disk::rename(folder, target)?;
    target.parent().map_or(Ok(()), disk::sync)
}

fn record(folder: &Path, prefix: &str, commit: &mut Commit) -> Result<()> {
    for path in disk::list(folder)? {
        let name = path.file_name().and_then(std::ffi::OsStr::to_str);
        let name = name.ok_or_else(|| Error::run("an artifact file has a name that is not Unicode").file(&path))?;
        let name = format!("{prefix}{name}");
        if path.is_dir() {
            record(&path, &format!("{name}/"), commit)?;
        } else {
            let size = fs::metadata(&path).map_err(|error| io_error("read", &path, error))?.len();
            commit.files.insert(name, FileRecord { size, blake3: disk::hash(&path)? });
        }
        disk::sync(&path)?;
    }
    Ok(())
}

fn stays(error: &Error) {
    tracing::warn!("checkpoints of a finished stage stay: {error}");
}

fn damaged(path: &Path, why: &str) -> Error {
    Error::data(format!("a stored artifact is damaged: {why}"))
        .file(path)
        .help("run the experiment again with `titer run`: the damaged stage is computed anew")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        (folder, store)
    }

    fn claim(store: &Store, key: &str) -> Claim {
        match store.claim(&key.to_owned(), || false, |_| ()).unwrap() {
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
        assert!(matches!(store.claim(&key, || false, |_| ()).unwrap(), Turn::Done(_)));
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
    fn an_artifact_under_another_key_is_refused_and_computed_anew() {
        let (folder, store) = store();
        let (a, b) = ("a".to_owned(), "b".to_owned());
        finish(&store, "a");
        finish(&store, "b");
        let aside = folder.path().join("aside");
        for (from, to) in
            [(store.stage(&a), &aside), (store.stage(&b), &store.stage(&a)), (aside.clone(), &store.stage(&b))]
        {
            fs::rename(from, to).unwrap();
        }
        let error = store.artifact(&a).unwrap_err().to_string();
        assert!(error.contains("belongs to `b`") && error.contains("help: "), "{error}");
        assert!(!store.is_committed(&a) && !store.is_committed(&b));
        finish(&store, "a").verified().unwrap();
        finish(&store, "b").verified().unwrap();
        // A record of an older format names no key.
        let record = store.stage(&a).join(COMMIT);
        let text = fs::read_to_string(&record).unwrap().replace("  \"key\": \"a\",\n", "");
        fs::write(&record, text).unwrap();
        assert!(!store.is_committed(&a));
    }

    #[test]
    fn a_checkpoint_of_another_stage_or_step_is_passed_over() {
        let (_folder, store) = store();
        let [a, b] = ["a", "b"].map(|key| claim(&store, key).partials());
        a.save(1, |_| Ok(())).unwrap();
        fs::create_dir_all(&b.folder).unwrap();
        fs::rename(a.folder.join("000000000001"), b.folder.join("000000000001")).unwrap();
        assert!(b.newest().is_none());
        a.save(1, |_| Ok(())).unwrap();
        fs::rename(a.folder.join("000000000001"), a.folder.join("000000000002")).unwrap();
        assert!(a.newest().is_none());
    }

    #[test]
    fn the_newest_whole_checkpoint_wins() {
        let (_folder, store) = store();
        let claim = claim(&store, "k");
        let partials = claim.partials();
        let save = |step, text: &str| {
            partials.save(step, |folder| disk::replace(&folder.join("w.txt"), text.as_bytes())).unwrap();
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
    fn checkpoints_of_finished_stages_are_swept() {
        let (_folder, store) = store();
        let names = || -> Vec<String> {
            let left = disk::list(&store.root.join("partial")).unwrap();
            left.iter().map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect()
        };
        finish(&store, "finished");
        finish(&store, "damaged");
        fs::remove_file(store.stage(&"damaged".to_owned()).join(COMMIT)).unwrap();
        finish(&store, "of another plan");
        finish(&store, "held");
        let keys = ["damaged", "finished", "held", "of another plan", "under way"].map(str::to_owned);
        for key in &keys {
            // What a process leaves that is killed between the commit and the removal of the checkpoints.
            Partials { folder: store.root.join("partial").join(key), key: key.clone() }.save(1, |_| Ok(())).unwrap();
        }
        let held = Lock::wait(&store.lock(&keys[2]), || true, |_| ()).unwrap();
        let finished = BTreeSet::from([keys[0].clone(), keys[1].clone(), keys[2].clone()]);
        store.sweep(&finished);
        assert_eq!(names(), ["damaged", "held", "of another plan", "under way"]);
        drop(held);
        store.sweep(&finished);
        assert_eq!(names(), ["damaged", "of another plan", "under way"]);
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
        assert_eq!(store.claim(&key, || true, |_| ()).unwrap_err().kind(), titer_core::Kind::Interrupted);
        std::thread::scope(|scope| {
            let second = scope.spawn(|| matches!(store.claim(&key, || false, |_| ()), Ok(Turn::Done(_))));
            std::thread::sleep(Duration::from_millis(50));
            first.commit(1.).unwrap();
            assert!(second.join().unwrap());
        });
    }
}
