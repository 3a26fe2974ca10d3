//! Safetensors and GGUF files, read tensor by tensor; safetensors files are written whole.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use safetensors::View;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};

use crate::bounds;
use crate::error::{Error, Result, io_error};
use crate::gguf::{Gguf, GgufTensors, StoredTensor};
use crate::registry::nearest;

/// One or several safetensors files, or a GGUF file, that together hold named tensors. Only the headers are kept in memory.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    files: Vec<(PathBuf, File)>,
    gguf: Option<GgufTensors>,
    tensors: BTreeMap<String, TensorPlace>,
}

/// Where a tensor is.
#[derive(Debug)]
enum TensorPlace {
    /// In one of the files, from this byte on.
    Safetensors(usize, u64, TensorInfo),
    /// In the GGUF file, under this name.
    Gguf(String),
}

impl Checkpoint {
    /// Opens one file (safetensors, or GGUF by its extension), or a Hugging Face folder: `model.safetensors`, or the shards
    /// that `model.safetensors.index.json` lists.
    ///
    /// # Errors
    /// A file is missing or malformed.
    pub fn open(path: &Path) -> Result<Self> {
        let mut checkpoint = Self { path: path.to_owned(), files: Vec::new(), gguf: None, tensors: BTreeMap::new() };
        if Gguf::is(path) {
            let tensors = GgufTensors::of(Gguf::open(path)?)?;
            checkpoint.tensors =
                tensors.names().into_iter().map(|(name, own)| (name, TensorPlace::Gguf(own))).collect();
            checkpoint.gguf = Some(tensors);
            return Ok(checkpoint);
        }
        let files = if path.is_dir() { model_files(path)? } else { vec![path.to_owned()] };
        for file in files {
            checkpoint.add(file)?;
        }
        Ok(checkpoint)
    }

    /// What was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Reads one tensor in the type it was stored in; blocks of a GGUF file in f32.
    ///
    /// # Errors
    /// There is no such tensor, or its type is not a float or integer type that candle has.
    pub fn read(&mut self, name: &str, device: &Device) -> Result<Tensor> {
        match self.read_stored(name, device)? {
            StoredTensor::Plain(tensor) => Ok(tensor),
            StoredTensor::Blocks(blocks) => Ok(blocks.dequantize(&Device::Cpu)?.to_device(device)?),
        }
    }

    /// Reads one tensor as it is stored; blocks stay on the host.
    ///
    /// # Errors
    /// As [`Checkpoint::read`].
    pub(crate) fn read_stored(&mut self, name: &str, device: &Device) -> Result<StoredTensor> {
        let Some(place) = self.tensors.get(name) else {
            let near = nearest(name, self.names()).map_or_else(String::new, |n| format!("; the nearest name is `{n}`"));
            return Err(Error::data(format!("tensor `{name}` is missing{near}"))
                .file(&self.path)
                .help("the weights belong to another architecture, or the file is incomplete"));
        };
        let (file, start, info) = match (place, &mut self.gguf) {
            (TensorPlace::Safetensors(file, start, info), _) => (file, start, info),
            (TensorPlace::Gguf(own), Some(gguf)) => {
                return Ok(match gguf.read(own)? {
                    StoredTensor::Plain(tensor) => StoredTensor::Plain(tensor.to_device(device)?),
                    blocks @ StoredTensor::Blocks(_) => blocks,
                });
            }
            (TensorPlace::Gguf(_), None) => return Err(Error::run("a GGUF file was closed")),
        };
        let dtype = dtype(info.dtype).ok_or_else(|| {
            Error::data(format!("tensor `{name}` has the unsupported type {:?}", info.dtype))
                .file(&self.path)
                .help("convert the weights to float32, bfloat16 or float16")
        })?;
        let (path, file) = &mut self.files[*file];
        let (begin, end) = info.data_offsets;
        let mut bytes = vec![0; end - begin];
        file.seek(SeekFrom::Start(start + begin as u64))
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(|error| io_error("read", path, error))?;
        Ok(StoredTensor::Plain(Tensor::from_raw_buffer(&bytes, dtype, &info.shape, device)?))
    }

    fn add(&mut self, path: PathBuf) -> Result<()> {
        let mut file = bounds::open("open the weights", &path).map_err(|error| {
            error.help("a model folder needs model.safetensors, or the shards that its index lists")
        })?;
        let damaged = |why: String| {
            Error::data(format!("`{}` is not a complete safetensors file: {why}", path.display()))
                .file(&path)
                .help("the file is truncated or damaged: copy or download it again")
        };
        let size = file.metadata().map_err(|error| io_error("read", &path, error))?.len();
        let mut prefix = [0; 8];
        file.read_exact(&mut prefix).map_err(|_| damaged(format!("it has {size} bytes")))?;
        let header = u64::from_le_bytes(prefix);
        if header > size.saturating_sub(8) {
            return Err(damaged(format!("its header should have {header} bytes, the file has {size}")));
        }
        if header > bounds::HEADER_BYTES {
            let most = bounds::HEADER_BYTES;
            return Err(damaged(format!("its header should have {header} bytes, at most {most} are possible")));
        }
        let mut bytes = vec![0; header as usize];
        file.read_exact(&mut bytes).map_err(|error| io_error("read", &path, error))?;
        let metadata: Metadata =
            serde_json::from_slice(&bytes).map_err(|error| damaged(format!("its header cannot be read ({error})")))?;
        let end = metadata.tensors().values().map(|info| info.data_offsets.1).max().unwrap_or(0) as u64;
        if 8 + header + end != size {
            return Err(damaged(format!("{} bytes are expected, found {size}", 8 + header + end)));
        }
        let index = self.files.len();
        let tensors = metadata.tensors().into_iter();
        self.tensors
            .extend(tensors.map(|(name, info)| (name, TensorPlace::Safetensors(index, 8 + header, info.clone()))));
        self.files.push((path, file));
        Ok(())
    }
}

fn model_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let single = folder.join("model.safetensors");
    let index = folder.join("model.safetensors.index.json");
    if !index.is_file() {
        let others = ["pytorch_model.bin", "pytorch_model.bin.index.json"];
        if let Some(name) = others.into_iter().find(|name| !single.exists() && folder.join(name).exists()) {
            return Err(Error::data(format!(
                "the folder has its weights in `{name}`, which can run code when it is read"
            ))
            .file(folder.join(name))
            .help("save the model as safetensors, as with transformers' `save_pretrained`"));
        }
        return Ok(vec![single]);
    }
    Ok(shards(&index)?.into_iter().map(|name| folder.join(name)).collect())
}

/// The names of the files that a shard index lists.
///
/// # Errors
/// The index cannot be read or is malformed.
pub fn shards(index: &Path) -> Result<BTreeSet<String>> {
    let again = "copy or download model.safetensors.index.json again";
    let bytes = bounds::read_file("read the shard index", index, bounds::JSON_BYTES)?;
    let map: serde_json::Value = serde_json::from_slice(&bytes)
        .map_err(|error| Error::data("the shard index is not valid JSON").file(index).source(error).help(again))?;
    let map = map["weight_map"].as_object();
    let map = map.ok_or_else(|| Error::data("the shard index has no `weight_map`").file(index).help(again))?;
    Ok(map.values().filter_map(|name| name.as_str()).map(str::to_owned).collect())
}

fn dtype(dtype: Dtype) -> Option<DType> {
    Some(match dtype {
        Dtype::F64 => DType::F64,
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        Dtype::I64 => DType::I64,
        Dtype::U32 => DType::U32,
        Dtype::U8 => DType::U8,
        _ => return None,
    })
}

/// Writes tensors in the safetensors format, one at a time. The bytes depend on names and values alone, and on what is noted
/// about the `format`: transformers wants to read `pt` there.
///
/// It writes to whatever it is given, because the library's own function makes a temporary file that only its owner may
/// read.
///
/// # Errors
/// Two tensors share a name, or `out` cannot be written to.
pub fn write_tensors(
    out: &mut dyn Write,
    format: Option<&str>,
    tensors: impl IntoIterator<Item = (String, Tensor)>,
) -> io::Result<()> {
    let mut tensors: Vec<(String, Tensor)> = tensors.into_iter().collect();
    // The format's own order: the widest type first, so that every tensor is aligned.
    tensors.sort_by(|(a, x), (b, y)| View::dtype(y).cmp(&View::dtype(x)).then_with(|| a.cmp(b)));
    let mut end = 0;
    let entries = tensors.iter().map(|(name, tensor)| {
        let begin = end;
        end += tensor.data_len();
        let (dtype, shape) = (View::dtype(tensor), tensor.dims().to_vec());
        (name.clone(), TensorInfo { dtype, shape, data_offsets: (begin, end) })
    });
    let noted = format.map(|format| [("format".to_owned(), format.to_owned())].into());
    let metadata = Metadata::new(noted, entries.collect()).map_err(io::Error::other)?;
    let mut header = serde_json::to_vec(&metadata)?;
    header.resize(header.len().next_multiple_of(size_of::<u64>()), b' ');
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    tensors.iter().try_for_each(|(_, tensor)| out.write_all(&tensor.data()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_are_those_of_the_safetensors_library() -> Result<()> {
        let device = &Device::Cpu;
        let tensors = [
            ("b", Tensor::new(&[1f32, -2.], device)?),
            ("a", Tensor::new(&[[0.5f32], [3.]], device)?),
            ("half", Tensor::new(&[1f32, 2., 3.], device)?.to_dtype(DType::BF16)?),
            ("wide", Tensor::new(&[1i64], device)?),
        ];
        let mut written = Vec::new();
        write_tensors(&mut written, None, tensors.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.clone())))
            .expect("memory takes all");
        let expected = safetensors::serialize(tensors.iter().map(|(name, tensor)| (*name, tensor)), None);
        assert_eq!(written, expected.expect("bytes"));
        Ok(())
    }
}
