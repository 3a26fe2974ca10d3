//! Tables with separators: CSV and TSV.

use titer_core::{Error, Result};

use super::{DataRecord, Header};

/// The records of a text with separators.
///
/// # Errors
/// The rows have different numbers of fields, or two columns one name.
pub(super) fn separated(text: &str, delimiter: u8, header: Header) -> Result<Vec<DataRecord>> {
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(delimiter)
        .quoting(delimiter == b',' || is_quoted(text, delimiter))
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
    DataRecord { line, file: 0, fields: columns.iter().cloned().zip(row.iter().map(str::to_owned)).collect() }
}

/// Whether fields stand in quotes, as pandas and Python's csv write them. Others write TSV without quotes at all, where a
/// quotation mark is one. It is told by the text: every field that begins with a mark must end with one, and one of them
/// must need its quotes, or all fields of the first line have them.
fn is_quoted(text: &str, delimiter: u8) -> bool {
    let (mut needed, mut first_line) = (false, None);
    let mut line_is_quoted = true;
    let mut bytes = text.bytes().peekable();
    // At the beginning of a field.
    while let Some(start) = bytes.next() {
        let mut end = Some(start);
        if start == b'"' {
            // Up to the mark that closes it; two are one.
            loop {
                match bytes.next() {
                    Some(b'"') if bytes.peek() == Some(&b'"') => {
                        bytes.next();
                        needed = true;
                    }
                    Some(b'"') => break,
                    Some(sign) => needed |= sign == delimiter || sign == b'\n',
                    None => return false,
                }
            }
            end = bytes.next();
            if end == Some(b'\r') {
                end = bytes.next();
            }
            if end.is_some_and(|sign| sign != delimiter && sign != b'\n') {
                return false;
            }
        } else {
            line_is_quoted = false;
            while end.is_some_and(|sign| sign != delimiter && sign != b'\n') {
                end = bytes.next();
            }
        }
        if end != Some(delimiter) {
            first_line.get_or_insert(line_is_quoted);
        }
    }
    needed || first_line == Some(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_of_a_tsv_file_are_told_from_quotation_marks() {
        for (text, quoted) in [
            ("a\tb\n\"x\ty\"\t1\n", true),
            ("a\tb\r\n\"x \"\"y\"\"\"\t1\r\n", true),
            ("\"a\"\t\"b\"\n\"x\"\t\"1\"\n", true),
            ("\"frailty \" is a word\t1\n\"x\ty\"\t1\n", false),
            ("it 's \"odd\" \t1\n", false),
            ("\"whole\"\t1\n", false),
            ("\"never closed\t1\n", false),
            ("", false),
        ] {
            assert_eq!(is_quoted(text, b'\t'), quoted, "{text}");
        }
    }

    /// What pandas writes by `to_csv(sep="\t")`.
    #[test]
    fn quoted_fields_may_hold_tabs_lines_and_quotes() -> Result<()> {
        let records = separated("q\ta\n\"x\ty\nz \"\"w\"\"\"\t1\nplain\t2\n", b'\t', Header::Yes)?;
        assert_eq!(records[0].fields["q"], "x\ty\nz \"w\"");
        assert_eq!((records[1].fields["q"].as_str(), records[1].line), ("plain", 4));
        Ok(())
    }
}
