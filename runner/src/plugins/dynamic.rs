//! Examines shared libraries and loads those that fit.
//!
//! Loading runs a file's constructors, so whatever can be known is read from the file before. Nothing is ever
//! unloaded: the registry, and every object that a plugin has made, point into it.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use object::Endianness;
use object::elf::{DT_NEEDED, FileHeader64};
use object::read::elf::{Dyn, FileHeader, SectionHeader};
use titer_core::registry::plugin::{ANCHOR, Plugin, PluginRecord, SECTION};
use titer_core::{Error, Result};

use crate::plugins::{LoadedPlugin, OWN, PluginFile, is_hash, registered};

/// How the shared core's file name begins.
const CORE: &str = "libtiter_dylib";
/// Anyone may write.
const WORLD_WRITABLE: u32 = 0o002;
/// Only owners may replace files, though anyone may write to the folder.
const STICKY: u32 = 0o1000;

/// Loads a shared library, unless it is among `loaded`.
///
/// # Errors
/// It does not fit, or registers what it must not.
pub(crate) fn load(file: &PluginFile, loaded: &[LoadedPlugin]) -> Result<Option<LoadedPlugin>> {
    let bytes = read(&file.path)?;
    let blake3 = blake3::hash(&bytes).to_hex().to_string();
    check_pin(file.blake3.as_deref(), &blake3)?;
    let path = std::fs::canonicalize(&file.path).map_err(|error| unreadable(&file.path).source(error))?;
    if loaded.iter().any(|known| known.path == path && known.blake3 == blake3) {
        return Ok(None);
    }
    let records = check(&bytes, &shared_core()?)?;
    check_names(&records)?;
    let before = registered();
    open(&path)?;
    for (kind, name, from) in registered().difference(&before) {
        if !records.iter().any(|record| record.crate_name() == *from) {
            let message =
                format!("the {kind} `{name}` takes its settings from the crate `{from}`, not the plugin's own");
            return Err(Error::config(message).help("give it a settings type of its own, so that its results can tell"));
        }
    }
    let crates: Vec<String> = Plugin::all()?.iter().map(|record| record.crate_name().to_owned()).collect();
    match records.iter().find(|record| !crates.iter().any(|name| name == record.crate_name())) {
        Some(record) => Err(Error::config(format!("`{}` did not register itself", record.title())).help(REBUILD)),
        None => Ok(Some(LoadedPlugin { path, blake3, records })),
    }
}

/// What helps against a plugin that was built otherwise.
const REBUILD: &str = "build the plugin with this very runner: `titer plugin build` and the plugin's folder";

/// The records of a shared library that fits this runner, read from the file's bytes.
///
/// # Errors
/// It is no shared library, no plugin, has a core of its own, or was built otherwise: field by field.
pub(crate) fn check(bytes: &[u8], core: &Path) -> Result<Vec<PluginRecord>> {
    let (section, needed) = parse(bytes).map_err(|error| {
        let error = Error::config("the file is no shared library that this runner could load").source(error);
        error.help("give the .so that `titer plugin build` wrote")
    })?;
    let records = PluginRecord::all(section)?;
    if records.is_empty() {
        return Err(Error::config("the file holds no plugin record").help(
            "write `titer_core::plugin!();` at the root of the plugin crate, and build it with `titer plugin build`",
        ));
    }
    let core = core.file_name().unwrap_or_default().to_string_lossy();
    if !needed.contains(&core.as_bytes()) {
        return Err(Error::config("the plugin carries its own copy of the core, which would compute wrong gradients")
            .at("expected", format!("linked to {core}"))
            .help(REBUILD));
    }
    records.iter().try_for_each(check_fingerprint)?;
    Ok(records)
}

fn check_fingerprint(record: &PluginRecord) -> Result<()> {
    let differences = record.differences();
    if differences.is_empty() {
        return Ok(());
    }
    let error = Error::config(format!("`{}` was built otherwise than this runner", record.title()));
    let error = differences.into_iter().fold(error, |error, (field, ours, theirs)| {
        error.at(field, format!("the runner has `{ours}`, the plugin `{theirs}`"))
    });
    Err(error.help(REBUILD))
}

/// The section of records, and the names of the libraries that the file links to.
fn parse(bytes: &[u8]) -> object::Result<(&[u8], Vec<&[u8]>)> {
    let header = FileHeader64::<Endianness>::parse(bytes)?;
    let endian = header.endian()?;
    let sections = header.sections(endian, bytes)?;
    let records = match sections.section_by_name(endian, SECTION.as_bytes()) {
        Some((_, section)) => section.data(endian, bytes)?,
        None => &[],
    };
    let mut needed = Vec::new();
    if let Some((entries, link)) = sections.dynamic(endian, bytes)? {
        let strings = sections.strings(endian, bytes, link)?;
        for entry in entries.iter().filter(|entry| entry.tag(endian) == DT_NEEDED) {
            needed.push(entry.string(endian, strings)?);
        }
    }
    Ok((records, needed))
}

/// The bytes of a file that only its owner could have put there.
fn read(path: &Path) -> Result<Vec<u8>> {
    let failed = |error| unreadable(path).source(error);
    let metadata = std::fs::symlink_metadata(path).map_err(failed)?;
    if metadata.is_symlink() {
        let target = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        return Err(Error::config("the plugin is a symbolic link, which may lead elsewhere tomorrow")
            .help(format!("name the file itself: {}", target.display())));
    }
    if !metadata.is_file() {
        return Err(Error::config("the plugin is no file").help("give the .so that `titer plugin build` wrote"));
    }
    let folder = path.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new("."));
    let folder_mode = std::fs::metadata(folder).map_err(failed)?.permissions().mode();
    if folder_mode & WORLD_WRITABLE != 0 && folder_mode & STICKY == 0 {
        return Err(Error::config(format!("anyone may replace files in `{}`", folder.display()))
            .help(format!("make it yours alone: chmod o-w {}", folder.display())));
    }
    if metadata.permissions().mode() & WORLD_WRITABLE != 0 {
        return Err(Error::config("anyone may write to the plugin")
            .help(format!("make sure that it is what you built, then: chmod o-w {}", path.display())));
    }
    std::fs::read(path).map_err(failed)
}

fn unreadable(path: &Path) -> Error {
    Error::config(format!("cannot read the plugin `{}`", path.display()))
        .help("build it with `titer plugin build`, which says where it is")
}

fn check_pin(expected: Option<&str>, found: &str) -> Result<()> {
    match expected {
        Some(expected) if !is_hash(expected) => Err(Error::config(format!("`{expected}` is no BLAKE3 hash"))
            .key("blake3")
            .help(format!("this file's is {found}"))),
        Some(expected) if !expected.eq_ignore_ascii_case(found) => {
            Err(Error::config("the plugin is not the file that was meant")
                .at("expected blake3", expected)
                .at("found blake3", found)
                .help("if you have just built it, name the new hash; if not, do not load it"))
        }
        _ => Ok(()),
    }
}

/// Two plugins of one name could not be told apart, and none may pass for Titer's own.
fn check_names(records: &[PluginRecord]) -> Result<()> {
    let known = Plugin::all()?;
    for record in records {
        let name = record.crate_name();
        if OWN.contains(&name) || known.iter().any(|other| other.crate_name() == name) {
            return Err(Error::config(format!("a crate called `{name}` is part of this runner already"))
                .help("name the plugin otherwise, or leave one of the two out"));
        }
    }
    Ok(())
}

/// The shared core that this process uses.
///
/// # Errors
/// The core is part of the program itself: the plugin would bring a second one.
pub(crate) fn shared_core() -> Result<PathBuf> {
    let address = &raw const ANCHOR as usize;
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let file = maps.lines().find_map(|line| {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let bound = |text| usize::from_str_radix(text, 16).ok();
        (bound(start)?..bound(end)?)
            .contains(&address)
            .then(|| PathBuf::from(&rest[rest.find('/').unwrap_or(rest.len())..]))
    });
    let is_core = |file: &PathBuf| file.file_name().is_some_and(|name| name.to_string_lossy().starts_with(CORE));
    file.filter(is_core).ok_or_else(|| {
        Error::config("this runner holds the core itself, so a plugin would bring a second one")
            .help("build the runner again, in a target folder of its own: `cargo build --release --features dynamic`")
    })
}

/// Makes the file a part of the process, for good.
#[expect(unsafe_code, reason = "loading a library runs its constructors")]
fn open(path: &Path) -> Result<()> {
    // SAFETY: the file was built by the same compiler against the very core of this process (`check`), so what it
    // shares with us has the same layout, and what its constructors run is the registration of its entries. That the
    // rest of its code does no harm is what the user vouched for by naming it.
    match unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) } {
        Ok(library) => {
            std::mem::forget(library);
            Ok(())
        }
        Err(error) => Err(Error::config("the system cannot load the plugin").source(error).help(REBUILD)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_library_is_refused() {
        for bytes in [&b""[..], b"plain text", &[0x7f, b'E', b'L', b'F', 2, 1, 1, 0]] {
            let error = check(bytes, Path::new("libtiter_dylib.so")).unwrap_err();
            assert!(error.message().contains("no shared library"), "{error}");
        }
        // A program without a record is a library of the right form.
        let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert!(check(&own, Path::new("libtiter_dylib.so")).unwrap_err().message().contains("no plugin record"));
    }
}
