//! Tables out of files: JSON, JSON lines, CSV, TSV, Parquet and Arrow, compressed or not, every record with its line for
//! error messages.

mod columnar;
mod packed;
mod separated;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use serde_json::Value;
use titer_core::bounds;
use titer_core::error::io_error;
use titer_core::registry::did_you_mean;
use titer_core::{Error, Result};

use columnar::Columnar;
use packed::unpacked;
use separated::separated;

/// One record: text by column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataRecord {
    /// The line it starts on, from 1; in files that have no lines, its number.
    pub line: usize,
    /// Which of the table's files it stands in.
    file: usize,
    fields: BTreeMap<String, String>,
}

impl DataRecord {
    fn bytes(&self) -> usize {
        self.fields.values().map(String::len).sum()
    }
}

/// A file, or the files of a folder, read whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataFile {
    path: PathBuf,
    files: Vec<PathBuf>,
    records: Vec<DataRecord>,
}

/// Whether the first line of a CSV or TSV file names the columns. Without names they are called `0`, `1`, ….
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Header {
    /// It does.
    Yes,
    /// It does not.
    No,
    /// It does if its first field is this word.
    If(&'static str),
}

impl DataFile {
    /// Reads a file by its extension: `.json` (an array of objects or of texts, an object that holds one such array, or JSON
    /// lines), `.jsonl` or `.ndjson`, `.csv` or `.tsv`, each also compressed with gzip, xz or zstd; Parquet and Arrow by
    /// their first bytes. A folder stands for the files that [`data_files`] names. Texts alone go into the column
    /// `instruction`.
    ///
    /// # Errors
    /// A file is missing, of another kind, malformed or empty.
    pub fn read(path: &Path, header: Header) -> Result<Self> {
        let files = data_files(path)?;
        let mut records = Vec::new();
        for (index, file) in files.iter().enumerate() {
            let found = records_of(file, header).map_err(|error| error.file(file))?;
            if let Some(record) = found.iter().find(|record| record.bytes() > bounds::RECORD_BYTES) {
                let most = bounds::RECORD_BYTES;
                return Err(Error::data(format!("a record has more than {most} bytes, which is a limit of Titer"))
                    .file(file)
                    .at("line", record.line.to_string())
                    .help("check for a quote that is never closed, or leave the row out"));
            }
            records.extend(found.into_iter().map(|record| DataRecord { file: index, ..record }));
        }
        if records.is_empty() {
            return Err(Error::data("the file holds no row")
                .file(path)
                .help("point it at a file with at least one row"));
        }
        Ok(Self { path: path.to_owned(), files, records })
    }

    /// Without the records that `keep` does not want.
    #[must_use]
    pub fn filtered(mut self, keep: impl Fn(&Self, &DataRecord) -> bool) -> Self {
        let kept = self.records.iter().filter(|record| keep(&self, record)).cloned().collect();
        self.records = kept;
        self
    }

    /// The records with this text in `column`.
    ///
    /// # Errors
    /// The first record has no such column.
    pub fn only(self, column: &str, text: &str) -> Result<Self> {
        if let Some(first) = self.records.first() {
            self.text(first, column)?;
        }
        Ok(self.filtered(|table, record| table.has(record, column, text)))
    }

    /// Whether a record has this text in `column`.
    pub fn has(&self, record: &DataRecord, column: &str, text: &str) -> bool {
        self.text(record, column).is_ok_and(|found| found == text)
    }

    /// Without the first `count` records.
    ///
    /// # Errors
    /// No record is left.
    pub fn without_first(mut self, count: usize) -> Result<Self> {
        if count > 0 && count >= self.records.len() {
            let message = format!("`skip` leaves out {count} rows, and the file has {}", self.records.len());
            return Err(Error::data(message).file(&self.path).key("skip").help("leave out fewer"));
        }
        self.records.drain(..count);
        Ok(self)
    }

    /// Every record.
    pub fn records(&self) -> &[DataRecord] {
        &self.records
    }

    /// The first `count` records.
    ///
    /// # Errors
    /// There are fewer.
    pub fn first(&self, count: usize) -> Result<&[DataRecord]> {
        self.records.get(..count).ok_or_else(|| {
            Error::data(format!("{count} rows were asked for, the file has {}", self.records.len()))
                .file(&self.path)
                .key("rows")
                .help("ask for fewer rows or give a longer file")
        })
    }

    /// The text of a record in `column`. Dots lead into columns that hold objects and lists: `category.violence`,
    /// `turns.0`.
    ///
    /// # Errors
    /// The record has no such column.
    pub fn text<'a>(&self, record: &'a DataRecord, column: &str) -> Result<Cow<'a, str>> {
        if let Some(text) = record.fields.get(column) {
            return Ok(Cow::Borrowed(text));
        }
        if let Some(text) = inner_text(record, column) {
            return Ok(Cow::Owned(text));
        }
        let columns: Vec<&str> = record.fields.keys().map(String::as_str).collect();
        let near = did_you_mean(column, columns.iter().copied());
        Err(self
            .fault(record, format!("there is no column `{column}`{near}"))
            .help(format!("columns of this row: {}", columns.join(", "))))
    }

    /// What `labels` says for the record's value in `column`.
    ///
    /// # Errors
    /// There is no such column, or the value is not a label.
    pub fn label<'a>(&self, record: &DataRecord, column: &str, labels: &[(&str, &'a str)]) -> Result<&'a str> {
        let value = self.text(record, column)?;
        let value = value.trim();
        labels.iter().find(|(known, _)| *known == value).map(|(_, label)| *label).ok_or_else(|| {
            let known: Vec<&str> = labels.iter().map(|(known, _)| *known).collect();
            self.fault(record, format!("`{value}` is not a label")).help(format!("labels are {}", known.join(", ")))
        })
    }

    /// An error at a record.
    pub fn fault(&self, record: &DataRecord, message: impl Into<String>) -> Error {
        Error::data(message).file(&self.files[record.file]).at("line", record.line.to_string())
    }
}

/// The files that `path` stands for: itself, those that its name fits as a pattern (`train-*.parquet`), or those of a folder. A
/// folder that `save_to_disk` of Hugging Face's datasets wrote names its Arrow files; else it is one of Parquet files. They are
/// in the order of their names.
///
/// # Errors
/// There are none, a shard is missing, or the folder cannot be read.
pub fn data_files(path: &Path) -> Result<Vec<PathBuf>> {
    let pattern = path.file_name().and_then(OsStr::to_str).filter(|name| name.contains('*'));
    let files = match (pattern, path.parent()) {
        (Some(pattern), Some(folder)) if !path.exists() => fitting_files(folder, pattern)?,
        _ if path.is_dir() => files_of_folder(path)?,
        _ => return Ok(vec![path.to_owned()]),
    };
    let group = |file: &Path| shard_of(file.file_name()?.to_str()?).map(|(group, count)| (group.to_owned(), count));
    let groups: Vec<_> = files.iter().filter_map(|file| group(file)).collect();
    for (group, count) in &groups {
        let found = groups.iter().filter(|(other, _)| other == group).count();
        if found != *count {
            let message = format!("`{group}` has {count} shards, and {found} are here");
            return Err(Error::data(message)
                .file(path)
                .help("bring the others here, or name the files to read one by one"));
        }
    }
    Ok(files)
}

/// What the shards of a split share, and how many there are, by the name of one: `train-00000-of-00005.parquet`.
fn shard_of(name: &str) -> Option<(&str, usize)> {
    let (before, after) = name.split_once("-of-")?;
    let (group, _) = before.rsplit_once('-')?;
    Some((group, after.split('.').next()?.parse().ok()?))
}

/// The two splits of a data set: the file in which its authors publish each, and what the hub calls it.
#[derive(Debug, Clone, Copy)]
pub struct Splits {
    /// To train on.
    pub train: [&'static str; 2],
    /// To ask.
    pub test: [&'static str; 2],
}

impl Splits {
    /// Where the rows to train on lie in `folder`.
    pub fn train_in(&self, folder: &Path) -> PathBuf {
        split_of(folder, self.train[0], self.train[1])
    }

    /// Where the rows to ask lie in `folder`.
    pub fn test_in(&self, folder: &Path) -> PathBuf {
        split_of(folder, self.test[0], self.test[1])
    }

    /// The files of both.
    pub fn files_in(&self, folder: &Path) -> Vec<PathBuf> {
        [files_at(&self.train_in(folder)), files_at(&self.test_in(folder))].concat()
    }
}

/// Where a split of a data set lies in `folder`: in the file `own`, as its authors publish it, or as repositories of the hub
/// have it, in shards called by the split's name or in a folder of that name. `own` if there is none of these.
pub fn split_of(folder: &Path, own: &str, split: &str) -> PathBuf {
    let lies = |path: &PathBuf| files_at(path).iter().all(|file| file.is_file());
    let names = [format!("data/{split}-*.parquet"), format!("{split}-*.parquet"), split.to_owned()];
    names.iter().map(|name| folder.join(name)).find(lies).unwrap_or_else(|| folder.join(own))
}

/// [`data_files`], and the path itself where there are none: that is reported when it is read.
pub fn files_at(path: &Path) -> Vec<PathBuf> {
    data_files(path).unwrap_or_else(|_| vec![path.to_owned()])
}

/// The files of a folder whose names fit a pattern.
fn fitting_files(folder: &Path, pattern: &str) -> Result<Vec<PathBuf>> {
    let wrong = |why: String| Error::data(why).file(folder.join(pattern));
    let matcher = glob::Pattern::new(pattern).map_err(|error| {
        wrong(format!("`{pattern}` is no pattern: {error}")).help("`*` stands for any part of a name")
    })?;
    let fits = |path: &PathBuf| path.file_name().and_then(OsStr::to_str).is_some_and(|name| matcher.matches(name));
    let files: Vec<PathBuf> = listed(folder)?.into_iter().filter(fits).collect();
    if files.is_empty() {
        return Err(wrong(format!("no file fits `{pattern}`")).help("check the path"));
    }
    Ok(files)
}

/// What is in a folder, in the order of the names.
fn listed(folder: &Path) -> Result<Vec<PathBuf>> {
    let listing = std::fs::read_dir(folder).map_err(|error| io_error("read the folder", folder, error))?;
    let mut paths: Vec<PathBuf> = listing.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    Ok(paths)
}

fn files_of_folder(path: &Path) -> Result<Vec<PathBuf>> {
    let state = path.join("state.json");
    if state.exists() {
        let bytes = bounds::read_file("read the state of the data set", &state, bounds::JSON_BYTES)?;
        let value: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        let names = value["_data_files"].as_array().into_iter().flatten();
        let names: Vec<&str> = names.filter_map(|file| file["filename"].as_str()).collect();
        let inside = |name: &&str| Path::new(name).file_name().is_some_and(|own| own == *name);
        if names.is_empty() || !names.iter().all(inside) {
            let error = Error::data("the file does not name the Arrow files beside it").file(&state);
            return Err(error.help("write the data set anew with `save_to_disk`"));
        }
        return Ok(names.into_iter().map(|name| path.join(name)).collect());
    }
    let mut files = listed(path)?;
    if path.join("dataset_dict.json").exists() {
        let splits = files.iter().filter(|file| file.is_dir()).filter_map(|file| file.file_name()?.to_str());
        let splits = splits.collect::<Vec<_>>().join(", ");
        let error = Error::data(format!("`{}` holds several splits", path.display())).file(path);
        return Err(error.help(format!("give the folder of one of them: {splits}")));
    }
    files.retain(|file| file.extension().is_some_and(|extension| extension == "parquet"));
    if files.is_empty() {
        let message = format!("`{}` is a folder without Parquet files, not a file", path.display());
        let inside = "give one of the data files in it, or a folder that `save_to_disk` wrote";
        return Err(Error::data(message).file(path).help(inside));
    }
    Ok(files)
}

/// The records of one file.
fn records_of(path: &Path, header: Header) -> Result<Vec<DataRecord>> {
    let bytes = unpacked(bounds::read_file("read the data", path, bounds::DATA_BYTES)?, path)?;
    if let Some(format) = Columnar::of(&bytes) {
        let rows = format.rows(bytes)?;
        return rows.into_iter().enumerate().map(|(index, row)| record(index + 1, row)).collect();
    }
    let text = bounds::text(&bytes, path)?;
    match kind_of(path) {
        "json" => json(text),
        "jsonl" | "ndjson" => json_lines(text),
        "csv" => separated(text, b',', header),
        "tsv" => separated(text, b'\t', header),
        "" => Err(Error::data("a data file without an extension cannot be read").help(format!("name it {KINDS}"))),
        other => Err(Error::data(format!("data files of type `{other}` cannot be read")).help(format!("use {KINDS}"))),
    }
}

const KINDS: &str = ".json, .jsonl, .csv, .tsv, .parquet or .arrow";

/// The extension of a file's name, without that of a compression.
fn kind_of(path: &Path) -> &str {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let plain = [".gz", ".xz", ".zst"].iter().find_map(|packed| name.strip_suffix(packed)).unwrap_or(name);
    Path::new(plain).extension().and_then(OsStr::to_str).unwrap_or_default()
}

/// The text at a path of dots into a column.
fn inner_text(record: &DataRecord, path: &str) -> Option<String> {
    let (mut at, mut rest) = path.char_indices().filter(|(_, sign)| *sign == '.').find_map(|(dot, _)| {
        let value: Value = serde_json::from_str(record.fields.get(&path[..dot])?).ok()?;
        Some((value, &path[dot + 1..]))
    })?;
    loop {
        let (step, more) = rest.split_once('.').map_or((rest, None), |(step, more)| (step, Some(more)));
        at = match at {
            Value::Object(mut map) => map.remove(step)?,
            Value::Array(mut list) => {
                let index = step.parse::<usize>().ok().filter(|index| *index < list.len())?;
                list.swap_remove(index)
            }
            _ => return None,
        };
        match more {
            Some(more) => rest = more,
            None => return as_text(at),
        }
    }
}

fn json(text: &str) -> Result<Vec<DataRecord>> {
    let value: Value = match serde_json::from_str(text) {
        Ok(value) => value,
        // Several values one behind the other: JSON lines under another name.
        Err(error) if error.to_string().starts_with("trailing characters") => return json_lines(text),
        Err(error) => {
            return Err(Error::data(format!("not valid JSON: {error}"))
                .at("line", error.line().to_string())
                .help("correct the line; the file must be an array of objects, [{…}, {…}], or JSON lines"));
        }
    };
    let rows = match value {
        Value::Array(rows) => rows,
        Value::Object(map) => {
            let arrays = map.into_iter().filter_map(|(_, value)| match value {
                Value::Array(rows) if !rows.is_empty() => Some(rows),
                _ => None,
            });
            let arrays: Vec<Vec<Value>> = arrays.collect();
            let [rows] = <[Vec<Value>; 1]>::try_from(arrays)
                .map_err(|_| Error::data("the file holds no array of rows").help("write [{…}, {…}]"))?;
            rows
        }
        _ => return Err(Error::data("the file holds no array of rows").help("write [{…}, {…}]")),
    };
    rows.into_iter().enumerate().map(|(index, row)| record(index + 1, row)).collect()
}

fn json_lines(text: &str) -> Result<Vec<DataRecord>> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let parse = |(index, line): (usize, &str)| {
        let row = serde_json::from_str(line).map_err(|error| {
            let error = Error::data(format!("not valid JSON: {error}")).at("line", (index + 1).to_string());
            error.help("every line must be one JSON object; give an array over several lines the extension .json")
        })?;
        record(index + 1, row)
    };
    lines.map(parse).collect()
}

fn record(line: usize, row: Value) -> Result<DataRecord> {
    let fields = match row {
        Value::Object(map) => map.into_iter().filter_map(|(key, value)| Some((key, as_text(value)?))).collect(),
        Value::String(text) => BTreeMap::from([("instruction".to_owned(), text)]),
        other => {
            return Err(Error::data(format!(
                "a row must be an object or a text, found `{}`",
                bounds::shortened(&other.to_string())
            ))
            .at("line", line.to_string())
            .help("write rows as {\"instruction\": \"…\", \"output\": \"…\"}"));
        }
    };
    Ok(DataRecord { line, file: 0, fields })
}

/// A value as the text of a column; none for a null.
fn as_text(value: Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text),
        Value::Null => None,
        other => Some(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, content: &[u8], header: Header) -> Result<DataFile> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(name);
        std::fs::write(&path, content).expect("a file");
        DataFile::read(&path, header)
    }

    /// The rows `x, y`, 1 and `z`, null.
    fn batch() -> arrow_array::RecordBatch {
        let q: arrow_array::ArrayRef = std::sync::Arc::new(arrow_array::StringArray::from(vec!["x, y", "z"]));
        let a: arrow_array::ArrayRef = std::sync::Arc::new(arrow_array::Int32Array::from(vec![Some(1), None]));
        arrow_array::RecordBatch::try_from_iter([("q", q), ("a", a)]).expect("a batch")
    }

    fn parquet() -> Vec<u8> {
        let mut bytes = Vec::new();
        let batch = batch();
        let mut writer = ::parquet::arrow::ArrowWriter::try_new(&mut bytes, batch.schema(), None).expect("a writer");
        writer.write(&batch).and_then(|()| writer.close()).expect("memory takes all");
        bytes
    }

    fn arrow_stream() -> Vec<u8> {
        let batch = batch();
        let mut writer = arrow_ipc::writer::StreamWriter::try_new(Vec::new(), &batch.schema()).expect("a writer");
        writer.write(&batch).and_then(|()| writer.finish()).expect("memory takes all");
        writer.into_inner().expect("bytes")
    }

    #[test]
    fn folders_stand_for_their_files() -> Result<()> {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).expect("a file");
        let read = || DataFile::read(folder.path(), Header::Yes);
        assert!(read().expect_err("empty").to_string().contains("without Parquet files"));
        write("train-00001-of-00002.parquet", &parquet());
        write("train-00000-of-00002.parquet", &parquet());
        write("README.md", b"#");
        assert_eq!(read()?.records().len(), 4);
        // What `save_to_disk` leaves.
        write("data-00000-of-00001.arrow", &arrow_stream());
        write("state.json", br#"{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}"#);
        assert_eq!(read()?.records().len(), 2);
        write("state.json", br#"{"_data_files": [{"filename": "../data.arrow"}]}"#);
        assert!(read().expect_err("outside").to_string().contains("does not name"));
        Ok(())
    }

    #[test]
    fn all_formats_give_the_same_records() -> Result<()> {
        let tables = [
            read("a.json", br#"[{"q": "x, y", "a": 1}, {"q": "z", "a": null}]"#, Header::Yes)?,
            read("a.json", br#"{"meta": 3, "rows": [{"q": "x, y", "a": 1}, {"q": "z"}]}"#, Header::Yes)?,
            read("a.jsonl", b"\xef\xbb\xbf{\"q\": \"x, y\", \"a\": 1}\n\n{\"q\": \"z\"}\n", Header::Yes)?,
            read("a.csv", b"q,a\r\n\"x, y\",1\r\nz,\r\n", Header::Yes)?,
            read("a.csv", b"q,a\n\"x, y\",1\nz,\n", Header::If("q"))?,
            read("a.tsv", b"q\ta\nx, y\t1\nz\t\n", Header::Yes)?,
            read("a.json", b"{\"q\": \"x, y\", \"a\": 1}\n{\"q\": \"z\"}\n", Header::Yes)?,
            read("a.ndjson", b"{\"q\": \"x, y\", \"a\": 1}\n{\"q\": \"z\"}\n", Header::Yes)?,
            read(
                "a.csv.zst",
                &zstd::stream::encode_all(&b"q,a\n\"x, y\",1\nz,\n"[..], 1).expect("bytes"),
                Header::Yes,
            )?,
            read("a.parquet", &parquet(), Header::Yes)?,
            read("a.arrow", &arrow_stream(), Header::Yes)?,
        ];
        for table in tables {
            let [first, second] = table.first(2)? else { panic!("two records") };
            assert_eq!(table.text(first, "q")?, "x, y");
            assert_eq!(table.text(first, "a")?, "1");
            assert_eq!(table.text(second, "q")?, "z");
        }
        let bare = read("a.tsv", b"it 's \"odd\" \t1\n", Header::If("sentence"))?;
        assert_eq!(bare.text(&bare.records()[0], "0")?, "it 's \"odd\" ");
        let texts = read("a.json", br#"{"instructions": ["do this"]}"#, Header::Yes)?;
        assert_eq!(texts.text(&texts.records()[0], "instruction")?, "do this");
        Ok(())
    }

    #[test]
    fn malformed_files_are_refused_with_their_place() {
        let cases: [(&str, &[u8], &str); 16] = [
            ("a.txt", b"x", "type `txt`"),
            ("a.json", b"", "not valid JSON"),
            ("a.json", b"[{\"a\": 1},\n{]", "line: 2"),
            ("a.json", b"{\"a\": 1}\n{\"a\"", "line: 2"),
            ("a.parquet", b"PAR1 and nothing else PAR1", "Parquet file cannot be read"),
            ("a.arrow", b"ARROW1\0\0 nothing", "Arrow file cannot be read"),
            ("a.arrow", b"\xff\xff\xff\xff\xff\xff\xff\x7f", "Arrow file cannot be read"),
            ("a.jsonl.gz", b"\x1f\x8b\x08 nothing", "cannot be unpacked"),
            ("a.json", b"3", "no array of rows"),
            ("a.json", b"{\"a\": [], \"b\": []}", "no array of rows"),
            ("a.json", b"[]", "holds no row"),
            ("a.json", b"[4]", "found `4`"),
            ("a.jsonl", b"{\"a\": 1}\n{\"a\": \n", "line: 2"),
            ("a.csv", b"a,b\n1,2\n1,2,3\n", "line: 3"),
            ("a.csv", b"a,a\n1,2\n", "occurs twice"),
            ("a.tsv", b"a\tb\n\xff\t1\n", "not valid UTF-8"),
        ];
        for (name, content, expected) in cases {
            let error = read(name, content, Header::Yes).expect_err(expected);
            assert!(error.to_string().contains(expected), "{error}");
            assert!(error.place("file").is_some(), "{error}");
            assert_eq!(error.kind(), titer_core::Kind::Data);
        }
        let error = DataFile::read(Path::new("no/such.json"), Header::Yes).expect_err("a missing file");
        assert!(error.to_string().contains("no/such.json"), "{error}");
    }

    #[test]
    fn a_missing_column_a_wrong_label_and_too_few_rows_name_their_place() -> Result<()> {
        let table = read("a.csv", b"text,label\nfine,1\n", Header::Yes)?;
        let record = &table.records()[0];
        let error = table.text(record, "txt").expect_err("no such column");
        assert!(error.to_string().contains("did you mean `text`") && error.place("line") == Some("2"), "{error}");
        let error = table.label(record, "label", &[("0", "negative")]).expect_err("no such label");
        assert!(error.to_string().contains("`1` is not a label"), "{error}");
        let error = table.first(2).expect_err("too few");
        assert!(error.to_string().contains("2 rows were asked for, the file has 1"), "{error}");
        Ok(())
    }

    #[test]
    fn shards_are_read_by_a_pattern_and_none_may_be_missing() {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |name: &str, text: &str| {
            std::fs::create_dir_all(folder.path().join(name).parent().expect("a folder")).expect("a folder");
            std::fs::write(folder.path().join(name), text).expect("a file");
        };
        write("train-00001-of-00002.jsonl", "{\"a\": 1}\n");
        write("test-00000-of-00001.jsonl", "{\"a\": 2}\n");
        let pattern = folder.path().join("train-*.jsonl");
        let error = DataFile::read(&pattern, Header::Yes).expect_err("a shard is missing");
        assert!(error.message().contains("2 shards, and 1") && error.remedy().is_some(), "{error}");
        write("train-00000-of-00002.jsonl", "{\"a\": 0}\n");
        let table = DataFile::read(&pattern, Header::Yes).expect("rows");
        let values: Vec<_> = table.records().iter().filter_map(|record| table.text(record, "a").ok()).collect();
        assert_eq!(values, ["0", "1"]);
        assert!(DataFile::read(&folder.path().join("none-*.jsonl"), Header::Yes).expect_err("none").remedy().is_some());

        let split = |own: &str| split_of(folder.path(), own, "validation");
        assert_eq!(split("dev.tsv"), folder.path().join("dev.tsv"));
        std::fs::create_dir_all(folder.path().join("validation")).expect("a folder");
        std::fs::write(folder.path().join("validation/0000.parquet"), parquet()).expect("a file");
        assert_eq!(split("dev.tsv"), folder.path().join("validation"));
        write("data/validation-00000-of-00001.parquet", "");
        assert_eq!(split("dev.tsv"), folder.path().join("data/validation-*.parquet"));
    }
}
