//! What the alignment changed: `V = W_aligned − W_base` of each weight matrix, which several defenses start from.
//!
//! It is here and not in the toolkit of `titer-core` since singular vectors need nalgebra, which nothing else in the core
//! uses. Defenses in other crates can take it from this one.

use candle_core::{DType, Device, Tensor};
use nalgebra::DMatrix;
use titer_core::defense::Ancestry;
use titer_core::tensor::ops;
use titer_core::tensor::ops::Gemm;
use titer_core::weights::Adapter;
use titer_core::{Conflict, Error, Matrix, Result, Stack, StageCx, Weights};

/// The change of a weight matrix as a product `B A`, in f64 on the host: what a low-rank adapter adds, or any change with `A = I`.
#[derive(Debug, Clone)]
pub struct MatrixUpdate {
    /// `B: [out, k]`, with the adapter's scale.
    b: Tensor,
    /// `A: [k, in]`; the identity if absent.
    a: Option<Tensor>,
}

impl MatrixUpdate {
    /// What `adapter` adds to its layer, `scale · B A`.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn of_adapter(adapter: &Adapter, scale: f64) -> Result<Self> {
        let b = (wide(&adapter.b)? * scale)?;
        Ok(Self { b, a: Some(wide(&adapter.a)?) })
    }

    /// A change `[out, in]` of any rank.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn of_difference(after: &Tensor, before: &Tensor) -> Result<Self> {
        Ok(Self { b: (wide(after)? - wide(before)?)?, a: None })
    }

    /// The left factor `[out, k]`: what stands left of the same right factor when the change is multiplied from the
    /// left.
    pub fn left(&self) -> &Tensor {
        &self.b
    }

    /// `A Aᵀ: [k, k]`, all that norms need of the right factor.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn right_gram(&self) -> Result<Tensor> {
        match &self.a {
            Some(a) => Gemm::NT.product(a, a),
            None => Ok(Tensor::eye(self.b.dim(1)?, DType::F64, self.b.device())?),
        }
    }

    /// The change `X A`, for a left factor `x: [out, k]`.
    #[must_use]
    pub fn with_left(&self, x: Tensor) -> Self {
        Self { b: x, a: self.a.clone() }
    }

    /// The Frobenius product `⟨X A, Y A⟩` of two left factors `[out, k]`.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn product(&self, x: &Tensor, y: &Tensor) -> Result<f64> {
        let terms = match &self.a {
            Some(a) => (Gemm::TN.product(x, y)? * Gemm::NT.product(a, a)?)?,
            None => (x * y)?,
        };
        Ok(ops::sum_all(&terms)?.to_scalar()?)
    }

    /// The Frobenius norm `‖V‖`.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn norm(&self) -> Result<f64> {
        Ok(self.product(&self.b, &self.b)?.max(0.).sqrt())
    }

    /// `V Vᵀ x` for `x: [out, n]`, without any `[out, out]` matrix.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn outer(&self, x: &Tensor) -> Result<Tensor> {
        let inner = Gemm::TN.product(&self.b, x)?;
        let inner = match &self.a {
            Some(a) => Gemm::NN.product(a, &Gemm::TN.product(a, &inner)?)?,
            None => inner,
        };
        Gemm::NN.product(&self.b, &inner)
    }

    /// The left singular vectors of the `rank` largest singular values, `[out, ≤ rank]`; those of all that are not
    /// zero (to rounding) if `rank` is absent.
    ///
    /// # Errors
    /// The decomposition or a tensor operation failed.
    pub fn left_singular_vectors(&self, rank: Option<usize>) -> Result<Tensor> {
        let b = to_nalgebra(&self.b)?;
        // For V = B A, only the small matrix between the orthogonal parts of the two factors is decomposed.
        let (outer, inner) = match &self.a {
            Some(a) => {
                let (left, right) = (b.qr(), to_nalgebra(&a.t()?)?.qr());
                let inner = left.r() * right.r().transpose();
                (Some(left.q()), inner)
            }
            None => (None, b),
        };
        let (rows, columns) = inner.shape();
        let svd = inner.svd(true, false);
        let u = svd.u.ok_or_else(|| Error::run("the singular vectors of an alignment update were not found"))?;
        let smallest = svd.singular_values.max() * f64::EPSILON * rows.max(columns) as f64;
        let found = svd.singular_values.iter().filter(|&&value| value > smallest).count();
        let u = u.columns(0, rank.map_or(found, |rank| rank.min(found))).into_owned();
        from_nalgebra(&outer.map_or(u.clone(), |q| q * u))
    }

    /// Adds `scale · V` to the parameter `name` of `weights`.
    ///
    /// # Errors
    /// There is no such parameter, a change of full rank meets weights in fewer bits than f32, or a tensor operation
    /// failed.
    pub fn add_to(&self, weights: &mut Weights, name: &str, scale: f64) -> Result<()> {
        match &self.a {
            Some(a) => weights.add_low_rank(name, scale, &self.b, a),
            None => weights.add(name, &(&self.b * scale)?),
        }
    }
}

/// The alignment updates of all weight matrices, each computed when it is asked for.
#[derive(Debug)]
pub struct AlignmentUpdates {
    aligned: Weights,
    /// What the aligned weights are compared with, unless an adapter says what was changed.
    base: Option<Weights>,
}

impl AlignmentUpdates {
    /// Those of the alignment that a stage's weights come from.
    ///
    /// # Errors
    /// The model was not aligned, or cannot be loaded.
    pub fn of(ancestry: &dyn Ancestry) -> Result<Self> {
        Self::between(ancestry, ancestry.aligned()?)
    }

    /// Those of the alignment that ends with this stage.
    ///
    /// # Errors
    /// The base model cannot be loaded.
    pub fn of_stage(cx: &StageCx) -> Result<Self> {
        Self::between(cx.ancestry, cx.weights.frozen())
    }

    fn between(ancestry: &dyn Ancestry, aligned: Weights) -> Result<Self> {
        let base = if aligned.lora().is_some() { None } else { Some(ancestry.base()?) };
        Ok(Self { aligned, base })
    }

    /// The names of the matrices that the alignment trained.
    pub fn names(&self) -> Vec<String> {
        match self.base {
            None => self.aligned.adapters().map(|(module, _)| format!("{module}.weight")).collect(),
            Some(_) => {
                let matrices = self.aligned.named().filter(|(_, matrix)| matrix.dims().len() == 2);
                matrices.map(|(name, _)| name.to_owned()).collect()
            }
        }
    }

    /// The update of the parameter `name`; `None` if the alignment left it as it was.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn get(&self, name: &str) -> Result<Option<MatrixUpdate>> {
        let update = match (&self.base, self.aligned.lora()) {
            (Some(base), _) => MatrixUpdate::of_difference(&matrix(&self.aligned, name)?, &matrix(base, name)?)?,
            (None, Some(lora)) => {
                let mut adapters = self.aligned.adapters();
                let own = adapters.find(|(module, _)| name.strip_suffix(".weight") == Some(*module));
                let Some((_, adapter)) = own else { return Ok(None) };
                MatrixUpdate::of_adapter(adapter, lora.scale())?
            }
            (None, None) => return Ok(None),
        };
        Ok(if update.norm()? > 0. { Some(update) } else { None })
    }
}

/// The [`conflicts`](titer_core::DefenseEntry::conflicts) of a defense that starts from the alignment's update.
pub fn needs_alignment(defense: &str, stack: &Stack) -> Option<Conflict> {
    let why = || format!("`{defense}` starts from what the alignment changed, and this method has no alignment");
    stack.align.is_none().then(|| Conflict::Refused(why()))
}

/// The base parameter `name` as it is computed with.
///
/// # Errors
/// There is no such parameter, or the device failed.
pub fn matrix(weights: &Weights, name: &str) -> Result<Tensor> {
    let found = weights.named().find(|(known, _)| *known == name);
    let (_, matrix) = found.ok_or_else(|| Error::run(format!("the model has no parameter `{name}`")))?;
    Matrix::dense(matrix)
}

/// `tensor` in f64, on the host: differences of weights are small beside the weights, and devices compute in f32 at most.
pub fn wide(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64)?)
}

/// `tensor` in the type and on the device of `like`.
pub fn placed(tensor: &Tensor, like: &Tensor) -> Result<Tensor> {
    Ok(tensor.to_dtype(like.dtype())?.to_device(like.device())?)
}

fn to_nalgebra(tensor: &Tensor) -> Result<DMatrix<f64>> {
    let (rows, columns) = tensor.dims2()?;
    Ok(DMatrix::from_row_iterator(rows, columns, tensor.flatten_all()?.to_vec1::<f64>()?))
}

fn from_nalgebra(matrix: &DMatrix<f64>) -> Result<Tensor> {
    let (rows, columns) = matrix.shape();
    // nalgebra stores columns.
    Ok(Tensor::from_vec(matrix.as_slice().to_vec(), (columns, rows), &Device::Cpu)?.t()?.contiguous()?)
}
