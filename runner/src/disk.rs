//! All that a run changes on disk, and what it reads of its own: the stage store and the results folder.
//!
//! Each function is one operation with an error that names the file and the remedy. They all ask `fault::check` first,
//! which in the tests of this crate lets any one of them fail, and which is an empty function everywhere else. The faults
//! are built for tests alone, rather than a feature or an environment variable, so that nothing can switch them on in a
//! program that people use. Files that a user brings (configurations, data, checkpoints) are not read through here.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use candle_core::Tensor;
use titer_core::bounds;
use titer_core::error::io_error;
use titer_core::weights::checkpoint;
use titer_core::{Error, Result};

/// Whoever waits for a lock is told after this time.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often a lock is tried.
const RETRY: Duration = Duration::from_millis(100);

/// What a function of this module does to the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Operation {
    MakeFolder,
    Create,
    Append,
    Write,
    Sync,
    Rename,
    Remove,
    List,
    Read,
    Lock,
}

/// A file that is being written.
#[derive(Debug)]
pub struct Output {
    path: PathBuf,
    file: File,
}

impl Output {
    /// A new file, empty, in the place of any other. Who may read it is left to the user's umask.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn create(path: &Path) -> Result<Self> {
        let file = fault::check(Operation::Create, path).and_then(|()| File::create(path));
        Ok(Self { path: path.to_owned(), file: file.map_err(|error| io_error("make the file", path, error))? })
    }

    /// A file to write lines behind what it holds. A last line that a killed process left torn is ended first, so that
    /// nothing else is lost.
    ///
    /// # Errors
    /// The file cannot be opened or read, or the torn line cannot be ended.
    pub fn append(path: &Path) -> Result<Self> {
        let mut file = fault::check(Operation::Append, path)
            .and_then(|()| File::options().create(true).read(true).append(true).open(path))
            .map_err(|error| io_error("open the file", path, error))?;
        let torn = fault::check(Operation::Read, path).and_then(|()| ends_torn(&mut file));
        let torn = torn.map_err(|error| io_error("read", path, error))?;
        let mut output = Self { path: path.to_owned(), file };
        if torn {
            output.put(b"\n")?;
        }
        Ok(output)
    }

    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// The disk is full or broken; a part may be written.
    pub fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.write_all(bytes).map_err(|error| io_error("write", &self.path, error))
    }

    /// Returns once the content is on disk.
    fn sync(&self) -> Result<()> {
        fault::check(Operation::Sync, &self.path)
            .and_then(|()| self.file.sync_all())
            .map_err(|error| io_error("sync", &self.path, error))
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        fault::check_write(&self.path, &mut self.file, bytes)?;
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Whether the last line of a file does not end.
fn ends_torn(file: &mut File) -> io::Result<bool> {
    if file.seek(SeekFrom::End(0))? == 0 {
        return Ok(false);
    }
    let mut last = [0];
    file.seek(SeekFrom::End(-1))?;
    file.read_exact(&mut last)?;
    Ok(last != *b"\n")
}

/// Makes a folder and those above it, unless they exist.
///
/// # Errors
/// It cannot be made.
pub fn make_folder(folder: &Path) -> Result<()> {
    fault::check(Operation::MakeFolder, folder)
        .and_then(|()| fs::create_dir_all(folder))
        .map_err(|error| io_error("make the folder", folder, error))
}

/// Writes a file in place, for a folder that is not visible yet.
///
/// # Errors
/// The file cannot be written.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    Output::create(path)?.put(bytes)
}

/// Writes a file whole: under another name, synced, then renamed, so that a reader finds the old content or the new.
/// Whoever writes to a folder that others may write to holds its lock.
///
/// # Errors
/// The file cannot be written; the old one stays.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let unfinished = path.with_added_extension("new");
    let mut file = Output::create(&unfinished)?;
    file.put(bytes)?;
    file.sync()?;
    rename(&unfinished, path)?;
    path.parent().filter(|folder| *folder != Path::new("")).map_or(Ok(()), sync)
}

/// Writes tensors as one safetensors file.
///
/// # Errors
/// The file cannot be written.
pub fn write_tensors(path: &Path, tensors: impl IntoIterator<Item = (String, Tensor)>) -> Result<()> {
    checkpoint::write_tensors(&mut Output::create(path)?, None, tensors).map_err(|error| io_error("write", path, error))
}

/// The same, with the note that transformers and PEFT look for.
///
/// # Errors
/// The file cannot be written.
pub fn write_tensors_for_torch(path: &Path, tensors: impl IntoIterator<Item = (String, Tensor)>) -> Result<()> {
    let write = checkpoint::write_tensors(&mut Output::create(path)?, Some("pt"), tensors);
    write.map_err(|error| io_error("write", path, error))
}

/// Returns once a file, or the names in a folder, are on disk.
///
/// # Errors
/// They cannot be brought there.
pub fn sync(path: &Path) -> Result<()> {
    fault::check(Operation::Sync, path)
        .and_then(|()| File::open(path)?.sync_all())
        .map_err(|error| io_error("sync", path, error))
}

/// Gives a file or folder another name.
///
/// # Errors
/// It cannot be renamed.
pub fn rename(from: &Path, to: &Path) -> Result<()> {
    fault::check(Operation::Rename, to)
        .and_then(|()| fs::rename(from, to))
        .map_err(|error| io_error("rename a finished file to", to, error))
}

/// Removes a file or a folder with all that is in it, if it exists.
///
/// # Errors
/// It cannot be removed; a part of a folder may be gone.
pub fn remove(path: &Path) -> Result<()> {
    let removed = fault::check(Operation::Remove, path).and_then(|()| match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    });
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", path, error)),
        _ => Ok(()),
    }
}

/// What a folder holds, sorted.
///
/// # Errors
/// It cannot be read.
pub fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    let paths = fault::check(Operation::List, folder)
        .and_then(|()| fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>());
    let mut paths = paths.map_err(|error| io_error("read the folder", folder, error))?;
    paths.sort();
    Ok(paths)
}

/// A file's content.
///
/// # Errors
/// It cannot be read.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    fault::check(Operation::Read, path).and_then(|()| fs::read(path)).map_err(|error| io_error("read", path, error))
}

/// The hash of a file's bytes.
///
/// # Errors
/// It cannot be read.
pub fn hash(path: &Path) -> Result<String> {
    let failed = |error| io_error("read", path, error);
    fault::check(Operation::Read, path).map_err(failed)?;
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(bounds::open("read", path)?).map_err(failed)?;
    Ok(hasher.finalize().to_hex().to_string())
}

/// A lock on a file that one process at a time can hold. It ends when it is dropped or its process ends.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Waits for the lock of the file at `path`, which is made if it does not exist. `give_up` is asked now and then. If it
    /// takes longer than a moment, `waiting` is told once the number of the process that holds the lock, where it is known.
    ///
    /// # Errors
    /// The file cannot be locked, or `give_up` said so.
    pub fn wait(path: &Path, give_up: impl Fn() -> bool, waiting: impl FnOnce(Option<u32>)) -> Result<Self> {
        let failed = |error| io_error("lock", path, error);
        let mut file = fault::check(Operation::Lock, path)
            .and_then(|()| File::options().create(true).truncate(false).read(true).write(true).open(path))
            .map_err(failed)?;
        let (begun, mut waiting) = (Instant::now(), Some(waiting));
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if give_up() => return Err(Error::interrupted()),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => return Err(failed(error)),
            }
            if begun.elapsed() >= PATIENCE
                && let Some(waiting) = waiting.take()
            {
                let mut holder = String::new();
                let read = file.read_to_string(&mut holder).ok();
                waiting(read.and_then(|_| holder.trim().parse().ok()));
            }
            std::thread::sleep(RETRY);
        }
        // Who holds it is only for people, so a full disk is no reason to fail here.
        let _ = file.set_len(0).and_then(|()| write!(file, "{}", std::process::id()));
        Ok(Self { _file: file })
    }
}

#[cfg(not(test))]
mod fault {
    use super::{File, Operation, Path, io};

    /// Nothing fails on purpose.
    #[expect(clippy::unnecessary_wraps, reason = "in tests it can fail")]
    #[inline]
    pub(super) fn check(_operation: Operation, _path: &Path) -> io::Result<()> {
        Ok(())
    }

    /// Likewise.
    #[inline]
    pub(super) fn check_write(path: &Path, _file: &mut File, _bytes: &[u8]) -> io::Result<()> {
        check(Operation::Write, path)
    }
}

/// Lets operations on a folder fail, for tests.
#[cfg(test)]
pub(crate) mod fault {
    use std::collections::BTreeMap;
    use std::sync::{Arc, Mutex, PoisonError};

    use super::{File, Operation, Path, PathBuf, Write, fs, io};

    /// How an operation fails.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) enum Fault {
        /// The disk is full: of a file half is written.
        Full,
        /// The disk is broken, this once.
        Broken,
        /// The process is killed before the operation: nothing after it reaches the disk.
        KilledBefore,
        /// The process is killed in the midst of it: a file is half written, a folder half removed.
        KilledWithin,
    }

    /// What a folder's operations were, and which one is to fail.
    #[derive(Debug)]
    struct WatchedDisk {
        folder: PathBuf,
        fault: Fault,
        /// The operation to fail, from 1; 0 for none.
        at: usize,
        calls: usize,
        counts: BTreeMap<String, usize>,
    }

    /// The folders that tests watch now. Tests run side by side in one process, so that a fault is tied to a folder.
    static WATCHED: Mutex<Vec<Arc<Mutex<WatchedDisk>>>> = Mutex::new(Vec::new());

    /// Watches a folder until it is dropped.
    #[derive(Debug)]
    pub(crate) struct DiskWatch(Arc<Mutex<WatchedDisk>>);

    impl DiskWatch {
        /// Lets the operation number `at` within `folder` fail.
        pub(crate) fn new(folder: &Path, fault: Fault, at: usize) -> Self {
            let watched = WatchedDisk { folder: folder.to_owned(), fault, at, calls: 0, counts: BTreeMap::new() };
            let watched = Arc::new(Mutex::new(watched));
            WATCHED.lock().unwrap_or_else(PoisonError::into_inner).push(watched.clone());
            Self(watched)
        }

        /// Operations so far, by kind.
        pub(crate) fn counts(&self) -> BTreeMap<String, usize> {
            self.0.lock().unwrap().counts.clone()
        }

        /// Whether the fault has come.
        pub(crate) fn struck(&self) -> bool {
            let watched = self.0.lock().unwrap();
            watched.calls >= watched.at
        }
    }

    impl Drop for DiskWatch {
        fn drop(&mut self) {
            let mut watched = WATCHED.lock().unwrap_or_else(PoisonError::into_inner);
            watched.retain(|other| !Arc::ptr_eq(other, &self.0));
        }
    }

    pub(super) fn check(operation: Operation, path: &Path) -> io::Result<()> {
        let Some((error, partly)) = strike(operation, path) else { return Ok(()) };
        match operation {
            Operation::Create if partly => drop(File::create(path)),
            Operation::Remove if partly => {
                let inner = fs::read_dir(path).ok().and_then(|mut entries| Some(entries.next()?.ok()?.path()));
                let _ =
                    inner.map(|inner| if inner.is_dir() { fs::remove_dir_all(inner) } else { fs::remove_file(inner) });
            }
            _ => {}
        }
        Err(error)
    }

    pub(super) fn check_write(path: &Path, file: &mut File, bytes: &[u8]) -> io::Result<()> {
        let Some((error, partly)) = strike(Operation::Write, path) else { return Ok(()) };
        if partly {
            file.write_all(&bytes[..bytes.len() / 2])?;
        }
        Err(error)
    }

    /// The error of an operation that fails, and whether a part of it is done.
    fn strike(operation: Operation, path: &Path) -> Option<(io::Error, bool)> {
        let all = WATCHED.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut watched = all.iter().map(|watched| watched.lock().unwrap()).find(|w| path.starts_with(&w.folder))?;
        watched.calls += 1;
        *watched.counts.entry(format!("{operation:?}")).or_default() += 1;
        let (now, past) = (watched.calls == watched.at, watched.at > 0 && watched.calls > watched.at);
        let killed = || io::Error::other("the process is dead");
        match watched.fault {
            Fault::Full if now => Some((io::ErrorKind::StorageFull.into(), operation == Operation::Write)),
            // EIO, which has no kind of its own.
            Fault::Broken if now => Some((io::Error::from_raw_os_error(5), false)),
            Fault::KilledBefore if now || past => Some((killed(), false)),
            Fault::KilledWithin if now || past => Some((killed(), now)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_waits_is_told_once_for_whom() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let held = Lock::wait(&path, || false, |_| panic!("it is free")).unwrap();
        let told = std::sync::Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            let second = scope.spawn(|| Lock::wait(&path, || false, |process| told.lock().unwrap().push(process)));
            std::thread::sleep(PATIENCE + 5 * RETRY);
            drop(held);
            second.join().unwrap().unwrap();
        });
        assert_eq!(told.into_inner().unwrap(), [Some(std::process::id())]);
    }

    #[test]
    fn a_failed_replacement_keeps_the_old_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        replace(&path, b"old").unwrap();
        // Made, written, synced, renamed.
        for at in 1..=4 {
            let watch = fault::DiskWatch::new(folder.path(), fault::Fault::Full, at);
            let error = replace(&path, b"new").unwrap_err().to_string();
            assert!(watch.struck() && error.contains("a.txt") && error.contains("help: free space"), "{error}");
            assert_eq!(read(&path).unwrap(), b"old");
        }
        replace(&path, b"new").unwrap();
        assert_eq!(read(&path).unwrap(), b"new");
    }
}
