//! Parquet files and Arrow files, as records of JSON.

use std::io::Cursor;

use arrow_array::RecordBatch;
use arrow_ipc::reader::{FileReader, StreamReader};
use arrow_json::LineDelimitedWriter;
use arrow_schema::ArrowError;
use bytes::Bytes;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::Value;
use titer_core::bounds;
use titer_core::guard::guarded;
use titer_core::{Error, Result};

/// A format of columns.
#[derive(Debug, Clone, Copy)]
pub(super) enum Columnar {
    Parquet,
    /// Arrow, in its file format.
    ArrowFile,
    /// Arrow, in its stream format, as `save_to_disk` of Hugging Face's datasets writes it.
    ArrowStream,
}

impl Columnar {
    /// The format of `bytes`, if it is one of these.
    pub(super) fn of(bytes: &[u8]) -> Option<Self> {
        let marks =
            [(&b"PAR1"[..], Self::Parquet), (b"ARROW1", Self::ArrowFile), (b"\xff\xff\xff\xff", Self::ArrowStream)];
        marks.into_iter().find(|(mark, _)| bytes.starts_with(mark)).map(|(_, format)| format)
    }

    /// The rows, each an object of its columns; a null is a column left out.
    ///
    /// # Errors
    /// The bytes are damaged, or hold a type that JSON cannot say.
    pub(super) fn rows(self, bytes: Vec<u8>) -> Result<Vec<Value>> {
        let name = if let Self::Parquet = self { "Parquet" } else { "Arrow" };
        let damaged = |why: String| {
            Error::data(format!("the {name} file cannot be read: {why}")).help(
                "it is cut off, damaged, or of a kind that is not read: copy it again, or export it as JSON lines",
            )
        };
        // The libraries trust lengths that a damaged file names.
        let lines = guarded(|| self.lines(bytes)).and_then(|lines| lines.map_err(|error| error.to_string()));
        let lines = lines.map_err(damaged)?;
        let rows = serde_json::Deserializer::from_slice(&lines).into_iter();
        rows.collect::<serde_json::Result<_>>().map_err(|error| damaged(error.to_string()))
    }

    /// JSON lines of the rows.
    fn lines(self, bytes: Vec<u8>) -> Result<Vec<u8>, ArrowError> {
        match self {
            Self::Parquet => written(ParquetRecordBatchReaderBuilder::try_new(Bytes::from(bytes))?.build()?),
            Self::ArrowFile => written(FileReader::try_new(Cursor::new(bytes), None)?),
            Self::ArrowStream => written(StreamReader::try_new(Cursor::new(bytes), None)?),
        }
    }
}

fn written(batches: impl Iterator<Item = Result<RecordBatch, ArrowError>>) -> Result<Vec<u8>, ArrowError> {
    let mut writer = LineDelimitedWriter::new(Vec::new());
    for batch in batches {
        writer.write(&batch?)?;
        if writer.get_ref().len() as u64 > bounds::DATA_BYTES {
            return Err(ArrowError::MemoryError(format!("it has more than {} bytes of text", bounds::DATA_BYTES)));
        }
    }
    writer.finish()?;
    Ok(writer.into_inner())
}
