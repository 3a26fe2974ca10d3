//! Tables out of files: JSON, JSON lines, CSV and TSV, every record with its line for error messages.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;
use titer_core::bounds;
use titer_core::registry::did_you_mean;
use titer_core::{Error, Result};

/// One record: text by column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataRecord {
    /// The line it starts on, from 1; in a JSON array, its number.
    pub line: usize,
    fields: BTreeMap<String, String>,
}

impl DataRecord {
    fn bytes(&self) -> usize {
        self.fields.values().map(String::len).sum()
    }
}

/// A file read whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataFile {
    path: PathBuf,
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
    /// Reads a file by its extension: `.json` (an array of objects or of texts, or an object that holds one such array),
    /// `.jsonl`, `.csv` or `.tsv`. Texts alone go into the column `instruction`.
    ///
    /// # Errors
    /// The file is missing, of another kind, malformed or empty.
    pub fn read(path: &Path, header: Header) -> Result<Self> {
        if path.is_dir() {
            let message = format!("`{}` is a folder, not a file", path.display());
            let inside = "give one of the data files in it; folders of Arrow files are not read";
            return Err(Error::data(message).file(path).help(inside));
        }
        let bytes = bounds::read_file("read the data", path, bounds::DATA_BYTES)?;
        let text = bounds::text(&bytes, path)?;
        let kind = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        let records = match kind {
            "json" => json(text),
            "jsonl" => json_lines(text),
            "csv" => separated(text, b',', header),
            "tsv" => separated(text, b'\t', header),
            "" => Err(Error::data("a data file without an extension cannot be read")
                .help("name it .json, .jsonl, .csv or .tsv")),
            other => Err(Error::data(format!("data files of type `{other}` cannot be read"))
                .help("use .json, .jsonl, .csv or .tsv")),
        };
        let records = records.map_err(|error| error.file(path))?;
        if let Some(record) = records.iter().find(|record| record.bytes() > bounds::RECORD_BYTES) {
            let message = format!("a record has more than {} bytes, which is a limit of Titer", bounds::RECORD_BYTES);
            return Err(Error::data(message)
                .file(path)
                .at("line", record.line.to_string())
                .help("check for a quote that is never closed, or leave the row out"));
        }
        if records.is_empty() {
            return Err(Error::data("the file holds no row")
                .file(path)
                .help("point it at a file with at least one row"));
        }
        Ok(Self { path: path.to_owned(), records })
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

    /// The text of a record in `column`.
    ///
    /// # Errors
    /// The record has no such column.
    pub fn text<'a>(&self, record: &'a DataRecord, column: &str) -> Result<&'a str> {
        record.fields.get(column).map(String::as_str).ok_or_else(|| {
            let columns: Vec<&str> = record.fields.keys().map(String::as_str).collect();
            let near = did_you_mean(column, columns.iter().copied());
            self.fault(record, format!("there is no column `{column}`{near}"))
                .help(format!("columns of this row: {}", columns.join(", ")))
        })
    }

    /// What `labels` says for the record's value in `column`.
    ///
    /// # Errors
    /// There is no such column, or the value is not a label.
    pub fn label<'a>(&self, record: &DataRecord, column: &str, labels: &[(&str, &'a str)]) -> Result<&'a str> {
        let value = self.text(record, column)?.trim();
        labels.iter().find(|(known, _)| *known == value).map(|(_, label)| *label).ok_or_else(|| {
            let known: Vec<&str> = labels.iter().map(|(known, _)| *known).collect();
            self.fault(record, format!("`{value}` is not a label")).help(format!("labels are {}", known.join(", ")))
        })
    }

    /// An error at a record.
    pub fn fault(&self, record: &DataRecord, message: impl Into<String>) -> Error {
        Error::data(message).file(&self.path).at("line", record.line.to_string())
    }
}

fn json(text: &str) -> Result<Vec<DataRecord>> {
    let broken = |error: &serde_json::Error| {
        let help = if error.to_string().starts_with("trailing characters") {
            "give a file of JSON lines the extension .jsonl"
        } else {
            "correct the line; the file must be an array of objects, [{…}, {…}]"
        };
        Error::data(format!("not valid JSON: {error}")).at("line", error.line().to_string()).help(help)
    };
    let value: Value = serde_json::from_str(text).map_err(|error| broken(&error))?;
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
    let text = |value: Value| match value {
        Value::String(text) => Some(text),
        Value::Null => None,
        other => Some(other.to_string()),
    };
    let fields = match row {
        Value::Object(map) => map.into_iter().filter_map(|(key, value)| Some((key, text(value)?))).collect(),
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
    Ok(DataRecord { line, fields })
}

fn separated(text: &str, delimiter: u8, header: Header) -> Result<Vec<DataRecord>> {
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(delimiter)
        .quoting(delimiter == b',')
        .has_headers(false)
        .from_reader(text.as_bytes());
    let mut columns: Option<Vec<String>> = None;
    let mut records = Vec::new();
    for row in reader.records() {
        let row = row.map_err(|error| {
            let line = error.position().map_or(0, csv::Position::line);
            Error::data(format!("not a regular table: {error}"))
                .at("line", line.to_string())
                .help("every row must have as many fields as the first; put fields with separators in quotes")
        })?;
        let Some(names) = &columns else {
            let named = match header {
                Header::Yes => true,
                Header::No => false,
                Header::If(word) => row.get(0) == Some(word),
            };
            let own: Vec<String> = row.iter().map(|name| name.trim().to_owned()).collect();
            let numbers: Vec<String> = (0..row.len()).map(|index| index.to_string()).collect();
            if named {
                if let Some(twice) = own.iter().enumerate().find(|(at, name)| own[..*at].contains(name)) {
                    return Err(Error::data(format!("the column `{}` occurs twice", twice.1))
                        .at("line", "1")
                        .help("rename or remove one of the two"));
                }
                columns = Some(own);
            } else {
                records.push(fields(&row, &numbers));
                columns = Some(numbers);
            }
            continue;
        };
        records.push(fields(&row, names));
    }
    Ok(records)
}

fn fields(row: &csv::StringRecord, columns: &[String]) -> DataRecord {
    let line = row.position().map_or(0, |position| position.line() as usize);
    DataRecord { line, fields: columns.iter().cloned().zip(row.iter().map(str::to_owned)).collect() }
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

    #[test]
    fn all_formats_give_the_same_records() -> Result<()> {
        let tables = [
            read("a.json", br#"[{"q": "x, y", "a": 1}, {"q": "z", "a": null}]"#, Header::Yes)?,
            read("a.json", br#"{"meta": 3, "rows": [{"q": "x, y", "a": 1}, {"q": "z"}]}"#, Header::Yes)?,
            read("a.jsonl", b"\xef\xbb\xbf{\"q\": \"x, y\", \"a\": 1}\n\n{\"q\": \"z\"}\n", Header::Yes)?,
            read("a.csv", b"q,a\r\n\"x, y\",1\r\nz,\r\n", Header::Yes)?,
            read("a.csv", b"q,a\n\"x, y\",1\nz,\n", Header::If("q"))?,
            read("a.tsv", b"q\ta\nx, y\t1\nz\t\n", Header::Yes)?,
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
        let cases: [(&str, &[u8], &str); 11] = [
            ("a.txt", b"x", "type `txt`"),
            ("a.json", b"", "not valid JSON"),
            ("a.json", b"[{\"a\": 1},\n{]", "line: 2"),
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
}
