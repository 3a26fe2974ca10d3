//! Files that are compressed: gzip, xz, zstd, told by their first bytes.

use std::io::Read;
use std::path::Path;

use titer_core::bounds;
use titer_core::{Error, Result};

/// How `bytes` are compressed, if they are, and what unpacks them.
fn unpacker<'a>(bytes: &'a [u8]) -> Option<(&'static str, std::io::Result<Box<dyn Read + 'a>>)> {
    if bytes.starts_with(b"\x1f\x8b") {
        return Some(("gzip", Ok(Box::new(flate2::read::MultiGzDecoder::new(bytes)))));
    }
    if bytes.starts_with(b"\xfd7zXZ\0") {
        return Some(("xz", Ok(Box::new(lzma_rust2::XzReader::new(bytes, true)))));
    }
    if bytes.starts_with(b"\x28\xb5\x2f\xfd") {
        let unpacker = zstd::stream::read::Decoder::with_buffer(bytes);
        return Some(("zstd", unpacker.map(|unpacker| Box::new(unpacker) as Box<dyn Read>)));
    }
    None
}

/// `bytes` as they are, or unpacked.
///
/// # Errors
/// They are damaged, or more than a data file may have.
pub(super) fn unpacked(bytes: Vec<u8>, path: &Path) -> Result<Vec<u8>> {
    let Some((kind, unpacker)) = unpacker(&bytes) else { return Ok(bytes) };
    let mut plain = Vec::new();
    unpacker.and_then(|unpacker| unpacker.take(bounds::DATA_BYTES + 1).read_to_end(&mut plain)).map_err(|error| {
        Error::data(format!("the file is compressed with {kind} and cannot be unpacked"))
            .file(path)
            .source(error)
            .help("it is cut off or damaged: copy or download it again")
    })?;
    if plain.len() as u64 <= bounds::DATA_BYTES {
        return Ok(plain);
    }
    let most = bounds::DATA_BYTES;
    Err(Error::data(format!("the file unpacks to more than {most} bytes, which is a limit of Titer"))
        .file(path)
        .help("split it, and give the part that is needed"))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn what_is_packed_is_unpacked_and_what_is_cut_off_is_refused() {
        let text = b"{\"a\": 1}\n".repeat(50);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        gzip.write_all(&text).expect("memory takes all");
        let options = lzma_rust2::XzOptions::with_preset(1);
        let mut xz = lzma_rust2::XzWriter::new(Vec::new(), options).expect("a writer");
        xz.write_all(&text).expect("memory takes all");
        let packed = [
            gzip.finish().expect("bytes"),
            xz.finish().expect("bytes"),
            zstd::stream::encode_all(&text[..], 1).expect("bytes"),
        ];
        for packed in packed {
            let cut = packed[..packed.len() - 9].to_vec();
            assert!(packed.len() < text.len());
            assert_eq!(unpacked(packed, Path::new("a")).expect("unpacked"), text);
            let error = unpacked(cut, Path::new("a")).expect_err("cut off").to_string();
            assert!(error.contains("cannot be unpacked") && error.contains("file: a"), "{error}");
        }
        assert_eq!(unpacked(text.clone(), Path::new("a")).expect("plain"), text);
    }
}
