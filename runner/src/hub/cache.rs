//! The cache on disk, laid out as Python's `huggingface_hub` has it, so that both share what either downloads:
//!
//! ```text
//! models--owner--name/blobs/ETAG                     contents; `ETAG.incomplete` while they come
//! models--owner--name/snapshots/COMMIT/config.json   links to them
//! models--owner--name/refs/main                      the commit of a branch
//! datasets--owner--name/…                            likewise of data sets
//! .locks/models--owner--name/ETAG.lock               who writes that content
//! ```

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use titer_core::bounds;
use titer_core::error::io_error;
use titer_core::event::{Event, Sink};
use titer_core::{Error, Result};

use super::{Announced, HubName, Listing, OFFLINE_REMEDY, Rest, Server, is_plain};
use crate::disk;

/// What progress is counted in.
const MIB: u64 = 1 << 20;
/// Bytes of a file with one line.
const LINE_BYTES: u64 = 4096;

/// An environment variable that is set and not empty.
pub(super) fn variable(name: &str) -> Option<String> {
    let value = std::env::var_os(name)?.into_string().ok()?;
    Some(value.trim().to_owned()).filter(|value| !value.is_empty())
}

/// The path that an environment variable holds.
pub(super) fn path_in(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// `HF_HOME`, or where Python has it.
fn home() -> PathBuf {
    path_in("HF_HOME").unwrap_or_else(|| {
        let caches = path_in("XDG_CACHE_HOME").or_else(|| path_in("HOME").map(|home| home.join(".cache")));
        caches.unwrap_or_else(std::env::temp_dir).join("huggingface")
    })
}

/// The user's token: `HF_TOKEN`, or that of `hf auth login`.
#[cfg(feature = "hub")]
pub(super) fn token() -> Result<Option<String>> {
    if let Some(token) = variable("HF_TOKEN") {
        return Ok(Some(token));
    }
    let path = home().join("token");
    if !path.is_file() {
        return Ok(None);
    }
    let bytes = bounds::read_file("read the token", &path, LINE_BYTES)?;
    Ok(Some(bounds::text(&bytes, &path)?.trim().to_owned()).filter(|token| !token.is_empty()))
}

/// The part of the cache that belongs to one repository.
pub(super) struct RepositoryCache {
    folder: PathBuf,
    locks: PathBuf,
}

impl RepositoryCache {
    pub(super) fn new(name: &HubName) -> Result<Self> {
        let root = path_in("HF_HUB_CACHE").unwrap_or_else(|| home().join("hub"));
        // Paths of plans hold in any working directory.
        let root = std::path::absolute(&root).map_err(|error| io_error("find the cache", &root, error))?;
        let kind = if name.is_data() { "" } else { "models--" };
        let name = format!("{kind}{}", name.repository.replace('/', "--"));
        Ok(Self { folder: root.join(&name), locks: root.join(".locks").join(name) })
    }

    /// The folder with the files of a commit.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// What is there of a revision.
    pub(super) fn list(&self, revision: &str) -> Result<Listing> {
        let noted = self.folder.join("refs").join(revision);
        let commit = if self.snapshot(revision).is_dir() {
            revision.to_owned()
        } else if noted.is_file() {
            let bytes = bounds::read_file("read the revision's commit", &noted, LINE_BYTES)?;
            bounds::text(&bytes, &noted)?.trim().to_owned()
        } else {
            return Err(Error::data("the repository is not in the cache, and nothing may be downloaded")
                .file(&self.folder)
                .help(OFFLINE_REMEDY));
        };
        if !is_plain(&commit) {
            return Err(Error::data("the file names no commit").file(noted).help("remove this file and download anew"));
        }
        let names = names(&self.snapshot(&commit)).map_err(|error| error.help(OFFLINE_REMEDY))?;
        Ok(Listing { commit, names })
    }

    /// Notes which commit a revision is, for those who are offline.
    pub(super) fn note(&self, revision: &str, commit: &str) -> Result<()> {
        let noted = self.folder.join("refs").join(revision);
        if revision == commit || fs::read(&noted).is_ok_and(|found| found == commit.as_bytes()) {
            return Ok(());
        }
        noted.parent().map_or(Ok(()), disk::make_folder)?;
        // Others may write it at the same time: each under a name of its own, and the last one stays.
        let unfinished = noted.with_added_extension(std::process::id().to_string());
        disk::write(&unfinished, commit.as_bytes())?;
        disk::rename(&unfinished, &noted)
    }

    /// Brings a file into the folder of its commit, unless it is there. `sink` is told how far it is.
    pub(super) fn download(
        &self,
        server: &dyn Server,
        name: &HubName,
        commit: &str,
        file: &str,
        sink: Option<&dyn Sink>,
    ) -> Result<()> {
        let link = self.snapshot(commit).join(file);
        if link.is_file() {
            return Ok(());
        }
        let Announced { etag, size } = server.announce(name, commit, file)?;
        let blob = self.folder.join("blobs").join(&etag);
        [Some(self.locks.as_path()), blob.parent(), link.parent()]
            .into_iter()
            .flatten()
            .try_for_each(disk::make_folder)?;
        let waiting = |process: Option<u32>| {
            let whom = process.map_or_else(|| "another process".to_owned(), |process| format!("process {process}"));
            tracing::warn!("waits for {whom}, which downloads {file} of {}", name.repository);
        };
        let _lock = disk::Lock::wait(&self.locks.join(format!("{etag}.lock")), || false, waiting)?;
        if link.is_file() {
            // Another process was first, and may be reading it.
            return Ok(());
        }
        if !blob.metadata().is_ok_and(|found| found.len() == size) {
            let incoming = Incoming { path: blob.with_added_extension("incomplete"), file, size };
            incoming.complete(|from| server.read(name, commit, file, from), sink)?;
            disk::rename(&incoming.path, &blob)?;
        }
        let up = "../".repeat(2 + file.matches('/').count());
        link_to(&blob, &format!("{up}blobs/{etag}"), &link).map_err(|error| io_error("make the link", &link, error))
    }
}

/// The names of the files in a folder, with those of its folders before them.
pub(super) fn names(folder: &Path) -> Result<BTreeSet<String>> {
    let (mut names, mut folders) = (BTreeSet::new(), vec![(String::new(), folder.to_owned())]);
    while let Some((start, folder)) = folders.pop() {
        for path in disk::list(&folder)? {
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
            let name = format!("{start}{name}");
            // A link to a folder may lead round in a circle.
            if path.is_file() {
                names.insert(name);
            } else if path.is_dir() && !path.is_symlink() && !name.starts_with('.') {
                folders.push((format!("{name}/"), path));
            }
        }
    }
    Ok(names)
}

/// Lets `link` lead to `blob`, relatively, as the cache may be moved. A link that leads nowhere gives way.
fn link_to(blob: &Path, relative: &str, link: &Path) -> io::Result<()> {
    if link.symlink_metadata().is_ok() {
        fs::remove_file(link)?;
    }
    #[cfg(unix)]
    return std::os::unix::fs::symlink(relative, link).or_else(|_| fs::copy(blob, link).map(drop));
    // Links need rights there.
    #[cfg(not(unix))]
    return fs::copy(blob, link).map(|_| drop(relative));
}

/// A file that comes in, perhaps in several attempts.
struct Incoming<'a> {
    path: PathBuf,
    /// Its name in the repository.
    file: &'a str,
    size: u64,
}

impl Incoming<'_> {
    /// Adds what is missing, which `read` gives from a byte on.
    fn complete(&self, read: impl Fn(u64) -> Result<Rest>, sink: Option<&dyn Sink>) -> Result<()> {
        let failed = |error| io_error("write", &self.path, error);
        let mut out = File::options().create(true).truncate(false).write(true).open(&self.path).map_err(failed)?;
        // More than the whole is no part of it.
        let have = out.metadata().map(|found| found.len()).map_err(failed)?;
        let have = if have > self.size { 0 } else { have };
        if have < self.size || self.size == 0 {
            let Rest { from, body } = read(have)?;
            out.set_len(from).and_then(|()| out.seek(SeekFrom::Start(from))).map_err(failed)?;
            let mut progress = sink.map(|sink| Progress::begin(sink, self.file, from, self.size));
            let appended = self.append(from, body, &mut out, progress.as_mut());
            if let Some(progress) = &progress {
                progress.end(appended.as_ref().err());
            }
            appended?;
        }
        out.sync_all().map_err(failed)
    }

    /// Copies the body behind what is there.
    fn append(&self, from: u64, body: impl Read, out: &mut File, mut progress: Option<&mut Progress>) -> Result<()> {
        let mut have = from;
        // One more than there may be, to see that there is more.
        let mut body = body.take(self.size.saturating_sub(from) + 1);
        let mut buffer = vec![0; 1 << 16];
        loop {
            let count = match body.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.cut_off(have).source(error)),
            };
            have += count as u64;
            if have > self.size {
                // Nothing of it can be trusted.
                let _ = out.set_len(0);
                return Err(Error::data(format!("`{}` is longer than the {} bytes announced", self.file, self.size))
                    .help("run the same command again; if the error stays, check HF_ENDPOINT"));
            }
            out.write_all(&buffer[..count]).map_err(|error| io_error("write", &self.path, error))?;
            if let Some(progress) = progress.as_deref_mut() {
                progress.at(have);
            }
        }
        if have < self.size { Err(self.cut_off(have)) } else { Ok(()) }
    }

    fn cut_off(&self, have: u64) -> Error {
        Error::data(format!("the download of `{}` ended after {have} of {} bytes", self.file, self.size))
            .help("run the same command again: it goes on where this one stopped")
    }
}

/// Tells a reporter how far a download is, in MiB, as if it were a stage.
struct Progress<'a> {
    sink: &'a dyn Sink,
    label: String,
    started: Instant,
    told: u64,
}

impl<'a> Progress<'a> {
    fn begin(sink: &'a dyn Sink, file: &str, from: u64, size: u64) -> Self {
        let (label, told) = (format!("download {file} (MiB)"), from / MIB);
        let (total, resumed) = (size.div_ceil(MIB) as usize, told as usize);
        sink.emit(Event::StageStarted { key: label.clone(), label: label.clone(), total, resumed });
        Self { sink, label, started: Instant::now(), told }
    }

    fn at(&mut self, have: u64) {
        if have / MIB > self.told {
            self.told = have / MIB;
            self.sink.emit(Event::Step { key: self.label.clone(), step: self.told as usize, loss: None });
        }
    }

    fn end(&self, error: Option<&Error>) {
        let (key, label) = (self.label.clone(), self.label.clone());
        self.sink.emit(match error {
            None => Event::StageFinished { key, label, seconds: self.started.elapsed().as_secs_f64() },
            Some(error) => Event::StageFailed { key, label, error: error.message().to_owned() },
        });
    }
}
