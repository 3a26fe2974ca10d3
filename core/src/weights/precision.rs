//! How the numbers of a base model are stored: in full, or frozen in half precision or quantized.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};

use crate::error::{Error, Result};
use crate::tensor::matrix::Matrix;
use crate::weights::schema::{Param, ParamList, Role};

/// How the base of a model is stored: what `dtype` means in a configuration.
///
/// | name | linear layers | embedding, head | bits a weight | |
/// |---|---|---|--:|---|
/// | `f32` | f32 | f32 | 32 | the only one that can be trained in full |
/// | `bf16`, `f16` | half precision | half precision | 16 | frozen |
/// | `q8_0` | blocks of 32 | bf16 | 8.5 | frozen |
/// | `q6k` | blocks of 256 | bf16 | 6.6 | frozen |
/// | `q4_1` | blocks of 32 | bf16 | 5 | frozen |
/// | `q4k`, `q4_0` | blocks of 256, of 32 | bf16 | 4.5 | frozen |
/// | `stored` | as the checkpoint has them | likewise | as there | frozen |
///
/// The CPU computes in f32 whatever is stored, and keeps norms and biases in f32; CUDA devices compute in bf16 on every
/// type but f32. Adapters, their gradients and the optimiser's moments are f32 everywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// Numbers of their own: f64, f32, bf16 or f16.
    Plain(DType),
    /// The weights of linear layers quantized, in blocks of small integers with a common scale; bf16 for the rest.
    Quantized(GgmlDType),
    /// Everything as the checkpoint stores it: the blocks of a GGUF file, or numbers of their own. Blocks of kinds that
    /// nothing multiplies with are widened to f32.
    Stored,
}

impl From<DType> for Precision {
    fn from(dtype: DType) -> Self {
        Self::Plain(dtype)
    }
}

impl Precision {
    /// What a configuration may ask for.
    const ALL: [(&'static str, Self); 9] = [
        ("f32", Self::Plain(DType::F32)),
        ("f16", Self::Plain(DType::F16)),
        ("bf16", Self::Plain(DType::BF16)),
        ("q8_0", Self::Quantized(GgmlDType::Q8_0)),
        ("q6k", Self::Quantized(GgmlDType::Q6K)),
        ("q4_1", Self::Quantized(GgmlDType::Q4_1)),
        ("q4k", Self::Quantized(GgmlDType::Q4K)),
        ("q4_0", Self::Quantized(GgmlDType::Q4_0)),
        ("stored", Self::Stored),
    ];

    /// The precision called `name`.
    ///
    /// # Errors
    /// The name is unknown; the error lists the known ones.
    pub fn parse(name: &str) -> Result<Self> {
        let known = Self::ALL.into_iter().find(|(known, _)| *known == name);
        known.map(|(_, precision)| precision).ok_or_else(|| {
            let names: Vec<&str> = Self::ALL.iter().map(|(name, _)| *name).collect();
            Error::config(format!("unknown element type `{name}`"))
                .key("dtype")
                .help(format!("use one of {}", names.join(", ")))
        })
    }

    /// Whether full training is possible: a step of the optimiser is smaller than what low precision can tell.
    ///
    /// # Errors
    /// It is not.
    pub fn check_trainable(self) -> Result<()> {
        if matches!(self, Self::Plain(DType::F32 | DType::F64)) {
            return Ok(());
        }
        Err(Error::config(format!("weights stored as {self} are frozen: they cannot be trained in full"))
            .key("dtype")
            .help("use dtype = \"f32\", or train a LoRA adapter"))
    }

    /// Whether every linear layer of a model with these parameters can be stored so.
    ///
    /// # Errors
    /// The rows of one are no whole number of blocks.
    pub fn check(self, params: &ParamList) -> Result<()> {
        params.iter().try_for_each(|param| self.check_param(param))
    }

    fn check_param(self, param: &Param) -> Result<()> {
        let Some(kind) = self.quantization_of(param) else { return Ok(()) };
        let (columns, block) = (param.shape.last().copied().unwrap_or(0), kind.block_size());
        if columns > 0 && columns.is_multiple_of(block) {
            return Ok(());
        }
        let message = format!("`{}` has rows of {columns} numbers, but {self} takes blocks of {block}", param.name);
        let help = if block > 32 { "use q8_0 or q4_0, which take blocks of 32, or bf16" } else { "use bf16 or f32" };
        Err(Error::config(message).key("dtype").help(help))
    }

    /// How `param` is quantized, if it is. The head is not: its rounding goes into every logit.
    fn quantization_of(self, param: &Param) -> Option<GgmlDType> {
        match self {
            Self::Quantized(kind) if param.role == Role::Linear => Some(kind),
            _ => None,
        }
    }

    /// The type of activations over weights of this precision on `device`.
    pub fn activation_dtype(self, device: &Device) -> DType {
        match self {
            Self::Plain(dtype) if dtype == DType::F64 || !device.is_cpu() => dtype,
            Self::Quantized(_) | Self::Stored if !device.is_cpu() => DType::BF16,
            _ => DType::F32,
        }
    }

    /// What `make` gives, as the parameter `param` is stored on `device`. Blocks are made on the host: `make` is told where
    /// the tensor is wanted.
    pub(crate) fn store(
        self,
        param: &Param,
        device: &Device,
        make: impl FnOnce(&Device) -> Result<Tensor>,
    ) -> Result<Matrix> {
        let computed = self.activation_dtype(device);
        self.check_param(param)?;
        if let Some(kind) = self.quantization_of(param) {
            return Matrix::quantized(&make(&Device::Cpu)?, kind, computed, device);
        }
        let tensor = make(device)?;
        let dtype = match self {
            Self::Plain(dtype) => dtype,
            Self::Quantized(_) => DType::BF16,
            Self::Stored => tensor.dtype(),
        };
        if dtype == computed || param.shape.len() < 2 {
            return Ok(Matrix::Dense(tensor.to_dtype(computed)?));
        }
        Matrix::half(&tensor, dtype, computed)
    }
}

impl Precision {
    /// Blocks as they are, for the parameter `param`; the tensor of those that nothing multiplies with.
    pub(crate) fn store_blocks(self, param: &Param, blocks: QTensor, device: &Device) -> Result<Matrix> {
        if param.shape.len() == 2 && Matrix::multiplies(blocks.dtype()) {
            return Matrix::blocks(blocks, self.activation_dtype(device), device);
        }
        self.store(param, device, |device| Ok(blocks.dequantize(&Device::Cpu)?.to_device(device)?))
    }
}

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match Self::ALL.iter().find(|(_, known)| known == self) {
            Some((name, _)) => f.write_str(name),
            None => write!(f, "{self:?}"),
        }
    }
}
