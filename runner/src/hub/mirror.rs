//! A folder in the hub's place, for machines without internet: it holds the files of each repository in `owner/name`.

use std::path::Path;

use titer_core::bounds;
use titer_core::error::io_error;
use titer_core::{Error, Result};

use super::cache::names;
use super::{Listing, is_plain};

/// The file that may say which commit a folder holds.
const COMMIT: &str = ".commit";
const COMMIT_BYTES: u64 = 256;

/// What a folder of the mirror holds. Without a note of its commit, the names and sizes of its files stand for it.
pub(super) fn list(folder: &Path) -> Result<Listing> {
    if !folder.is_dir() {
        return Err(Error::data("the mirror has no such repository")
            .file(folder)
            .help("check the name and HF_ENDPOINT"));
    }
    let names = names(folder)?;
    let commit = if names.contains(COMMIT) {
        let path = folder.join(COMMIT);
        let bytes = bounds::read_file("read the commit", &path, COMMIT_BYTES)?;
        let commit = bounds::text(&bytes, &path)?.trim().to_owned();
        if !is_plain(&commit) {
            return Err(Error::data("the file names no commit")
                .file(path)
                .help("write the commit's hash, or remove it"));
        }
        commit
    } else {
        let mut whole = blake3::Hasher::new();
        for name in &names {
            let path = folder.join(name);
            let size = path.metadata().map_err(|error| io_error("read", &path, error))?.len();
            whole.update(format!("{name}\n{size}\n").as_bytes());
        }
        whole.finalize().to_hex().to_string()
    };
    Ok(Listing { commit, names })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_known_by_its_note_or_its_files() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        let commit = || list(folder.path()).map(|listing| listing.commit);
        write("a.json", "{}");
        let before = commit().unwrap();
        write("a.json", "[]");
        assert_eq!(commit().unwrap(), before);
        write("a.json", "[1]");
        assert_ne!(commit().unwrap(), before);
        write(COMMIT, "c0ffee\n");
        assert_eq!(commit().unwrap(), "c0ffee");
        write(COMMIT, "../c0ffee");
        assert!(commit().unwrap_err().remedy().is_some());
        assert!(list(&folder.path().join("none")).is_err());
    }
}
