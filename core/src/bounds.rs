//! Upper limits of what a user may ask for, checked before anything is allocated or drawn by such a number.
//!
//! They lie far above what is useful and well below what would exhaust a machine while a plan is made.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::error::{Error, Result, io_error};

/// Rows of one data set, drawn or asked for.
pub const ROWS: usize = 1_000_000;
/// Examples per batch, batches per update, batches per window.
pub const BATCH: usize = 65_536;
/// Tokens of a row or of an answer.
pub const TOKENS: usize = 1 << 20;
/// Threads.
pub const THREADS: usize = 1024;
/// Updates of one stage, or passes over its data.
pub const STEPS: usize = 100_000_000;
/// Rank of an adapter.
pub const RANK: usize = 65_536;
/// Cells of one experiment: the product of everything that is swept over.
pub const CELLS: usize = 20_000;
/// Rows of a vocabulary.
pub const VOCABULARY: usize = 1 << 24;
/// Width of a residual stream, of an MLP, of a head, and heads of a block.
pub const WIDTH: usize = 1 << 20;
/// Transformer blocks.
pub const LAYERS: usize = 4096;
/// Positions of a model.
pub const POSITIONS: usize = 1 << 24;
/// Parameters of a model.
pub const PARAMETERS: usize = 1 << 40;
/// Bytes of a configuration.
pub const CONFIG_BYTES: u64 = 1 << 20;
/// Bytes of a JSON file that belongs to a model, a tokenizer or a run.
pub const JSON_BYTES: u64 = 1 << 29;
/// Bytes of a data file.
pub const DATA_BYTES: u64 = 1 << 32;
/// Bytes of one record of a data file.
pub const RECORD_BYTES: usize = 1 << 24;
/// Bytes of the header of a safetensors file, as in the library of that name.
pub const HEADER_BYTES: u64 = 100_000_000;
/// Bytes of a prompt template.
pub const TEMPLATE_BYTES: usize = 65_536;
/// Tokens of the tags of a template in all, and of one tag: its parser and compiler are recursive.
pub const TEMPLATE_TOKENS: usize = 4_000;
/// See [`TEMPLATE_TOKENS`].
pub const TAG_TOKENS: usize = 250;
/// Work that rendering one prompt may take: instructions, and 64 bytes of text each.
pub const TEMPLATE_FUEL: u64 = 2_000_000;

/// Fails if `found` is above `most`.
///
/// # Errors
/// It is.
pub fn at_most(key: &str, found: usize, most: usize) -> Result<()> {
    if found <= most {
        return Ok(());
    }
    Err(Error::config(format!("`{key}` must be at most {most}, found `{found}`"))
        .key(key)
        .help(format!("set it to {most} or less; this is a limit of Titer")))
}

/// The bytes of the file at `path`; `action` says what for, as in [`io_error`].
///
/// # Errors
/// It cannot be read, is no regular file (a pipe would block, a device never ends), or has more than `most` bytes.
pub fn read_file(action: &str, path: &Path, most: u64) -> Result<Vec<u8>> {
    let file = open(action, path)?;
    let mut bytes = Vec::new();
    file.take(most + 1).read_to_end(&mut bytes).map_err(|error| io_error(action, path, error))?;
    if bytes.len() as u64 <= most {
        return Ok(bytes);
    }
    Err(Error::data(format!("cannot {action}: the file has more than {most} bytes, which is a limit of Titer"))
        .file(path)
        .help("check that it is the right file, or give a smaller one"))
}

/// The JSON file at `path`, which a model folder may lack; null if it does.
///
/// # Errors
/// As [`read_file`], or it is no JSON.
pub(crate) fn read_optional_json(path: &Path) -> Result<serde_json::Value> {
    if !path.exists() {
        return Ok(serde_json::Value::Null);
    }
    let bytes = read_file("read", path, JSON_BYTES)?;
    serde_json::from_slice(&bytes).map_err(|error| {
        Error::data("the file is not valid JSON").file(path).source(error).help("take it anew from the model's source")
    })
}

/// The file at `path`, for reading.
///
/// # Errors
/// As [`read_file`].
pub fn open(action: &str, path: &Path) -> Result<File> {
    let metadata = std::fs::metadata(path).map_err(|error| io_error(action, path, error))?;
    if metadata.is_file() {
        return File::open(path).map_err(|error| io_error(action, path, error));
    }
    let found = if metadata.is_dir() { "a folder" } else { "a device or a pipe" };
    Err(Error::data(format!("cannot {action}: `{}` is {found}, not a file", path.display()))
        .file(path)
        .help("give the path of a regular file"))
}

/// `bytes` of the file at `path` as text, without a byte order mark.
///
/// # Errors
/// They are not UTF-8, or hold a NUL; the error says what the file is, if that can be told.
pub fn text<'a>(bytes: &'a [u8], path: &Path) -> Result<&'a str> {
    if let Some((kind, remedy)) = kind_of(bytes) {
        return Err(Error::data(format!("the file is {kind}, not text in UTF-8")).file(path).help(remedy));
    }
    let line = |at: usize| (bytes[..at].split(|&byte| byte == b'\n').count()).to_string();
    let text = std::str::from_utf8(bytes).map_err(|error| {
        Error::data("the file is not valid UTF-8")
            .file(path)
            .at("line", line(error.valid_up_to()))
            .help("convert it to UTF-8, as with `iconv -f latin1 -t utf-8`")
    })?;
    if let Some(at) = text.find('\0') {
        return Err(Error::data("the file holds a NUL byte, so it is not text")
            .file(path)
            .at("line", line(at))
            .help("check that it is the right file"));
    }
    Ok(text.strip_prefix('\u{feff}').unwrap_or(text))
}

/// The beginning of `text`, for messages: the user knows the rest.
pub fn shortened(text: &str) -> String {
    const SHOWN: usize = 200;
    let shown: String = text.chars().take(SHOWN).collect();
    if shown.len() < text.len() { shown + "…" } else { shown }
}

/// What a file that is no text is, by its first bytes, and what to do with it.
fn kind_of(bytes: &[u8]) -> Option<(&'static str, &'static str)> {
    const UNPACK: &str = "unpack it first";
    const EXPORT: &str = "export it as JSON lines, as with pandas' `to_json(orient=\"records\", lines=True)`";
    const UTF16: &str = "convert it to UTF-8, as with `iconv -f utf-16 -t utf-8`";
    const KINDS: [(&[u8], &str, &str); 15] = [
        (b"PAR1", "a Parquet file", EXPORT),
        (b"ARROW1", "an Arrow file", EXPORT),
        (b"\xff\xff\xff\xff", "an Arrow stream", EXPORT),
        (b"SQLite format 3", "an SQLite database", EXPORT),
        (b"\x89HDF", "an HDF5 file", EXPORT),
        (b"\x93NUMPY", "a NumPy array", EXPORT),
        (b"\x1f\x8b", "compressed with gzip", "unpack it first, as with `gunzip`"),
        (b"\x28\xb5\x2f\xfd", "compressed with zstd", UNPACK),
        (b"\xfd7zXZ", "compressed with xz", UNPACK),
        (b"BZh", "compressed with bzip2", UNPACK),
        (b"PK\x03\x04", "a ZIP archive (or a spreadsheet, or weights of PyTorch)", UNPACK),
        (b"\x80\x02", "a Python pickle", "convert it; pickles are not read, since they can run code"),
        (b"GGUF", "a GGUF file", "give the folder of the model in Hugging Face's layout"),
        (b"\xff\xfe", "text in UTF-16", UTF16),
        (b"\xfe\xff", "text in UTF-16", UTF16),
    ];
    const POINTER: &[u8] = b"version https://git-lfs";
    if bytes.starts_with(POINTER) {
        return Some(("a Git LFS pointer in place of the file", "fetch it with `git lfs pull`"));
    }
    let start = bytes.trim_ascii_start();
    if [&b"<!DOCTYPE"[..], b"<!doctype", b"<html"].iter().any(|mark| start.starts_with(mark)) {
        return Some(("an HTML page", "download the file itself; some need a login"));
    }
    KINDS.iter().find(|(mark, ..)| bytes.starts_with(mark)).map(|(_, kind, remedy)| (*kind, *remedy))
}
