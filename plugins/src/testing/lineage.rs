//! A base model and what became of it, for the defenses that act after training.

use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use titer_core::defense::{Ancestry, Clock, Streams};
use titer_core::rng::{Seed, randn};
use titer_core::testing::{difference, values};
use titer_core::weights::LoraConfig;
use titer_core::{Model, Precision, Result, StageCx, Weights};

use super::models::small;
use super::steps::defense;

/// A base model and what the alignment made of it.
#[derive(Debug)]
pub struct TrainedLineage {
    /// Before alignment.
    pub base: Weights,
    /// After it.
    pub aligned: Weights,
}

impl Ancestry for TrainedLineage {
    fn base(&self) -> Result<Weights> {
        self.base.merged()
    }

    fn aligned(&self) -> Result<Weights> {
        Ok(self.aligned.clone())
    }
}

impl TrainedLineage {
    /// Alignment by an adapter of rank 3.
    pub fn by_adapter(model: &dyn Model, precision: impl Into<Precision> + Copy) -> Result<Self> {
        let mut aligned = fresh(model, precision)?;
        adapt(&mut aligned, 3, 10)?;
        Ok(Self { base: fresh(model, precision)?, aligned })
    }

    /// Alignment of all parameters.
    pub fn in_full(model: &dyn Model) -> Result<Self> {
        let mut aligned = fresh(model, DType::F64)?;
        aligned.train_full()?;
        jolt(&aligned, 10)?;
        Ok(Self { base: fresh(model, DType::F64)?, aligned })
    }

    /// Fine-tuning by a second adapter, of rank 2.
    pub fn user(&self) -> Result<Weights> {
        let mut user = self.aligned.merged()?;
        adapt(&mut user, 2, 20)?;
        Ok(user)
    }

    /// Fine-tuning of all parameters.
    pub fn user_in_full(&self) -> Result<Weights> {
        let mut user = self.aligned.merged()?;
        user.train_full()?;
        jolt(&user, 20)?;
        Ok(user)
    }

    /// `V = W_aligned − W_base`.
    pub fn update(&self, name: &str) -> Result<Tensor> {
        Ok((dense(&self.aligned, name)? - dense(&self.base, name)?)?)
    }
}

fn fresh(model: &dyn Model, precision: impl Into<Precision>) -> Result<Weights> {
    Weights::random(model.params(), Seed::new(1), precision, &Device::Cpu)
}

/// Attaches an adapter of scale 2, and moves its factors as training would.
fn adapt(weights: &mut Weights, r: usize, seed: u64) -> Result<()> {
    let targets = ["q_proj", "o_proj", "down_proj"].map(str::to_owned).to_vec();
    let lora = LoraConfig { r, alpha: 2. * r as f64, dropout: 0., target_modules: Some(targets) };
    weights.train_lora(&lora, Seed::new(seed))?;
    jolt(weights, seed)
}

fn jolt(weights: &Weights, seed: u64) -> Result<()> {
    for (name, var) in weights.trainable() {
        let noise = randn(var.dims(), &mut Seed::new(seed).named(name).generator(), &Device::Cpu)?;
        var.set(&(var.as_detached_tensor() + (noise.to_dtype(var.dtype())? * 0.1)?)?)?;
    }
    Ok(())
}

/// A parameter with everything merged, in f64.
pub fn dense(weights: &Weights, name: &str) -> Result<Tensor> {
    let merged = weights.merged()?;
    let (_, matrix) = merged.named().find(|(known, _)| *known == name).expect("a parameter");
    Ok(matrix.dense()?.to_dtype(DType::F64)?)
}

/// The names of all matrices.
pub fn matrices(model: &dyn Model) -> Vec<String> {
    model.params().iter().filter(|param| param.shape.len() == 2).map(|param| param.name.clone()).collect()
}

/// Everything that the weights hold, merged, to compare bit for bit.
pub fn bits(weights: &Weights) -> Result<Vec<Vec<f64>>> {
    weights.merged()?.named().map(|(_, matrix)| values(&matrix.dense()?)).collect()
}

/// Lets a defense finish a stage of `total` steps.
pub fn finish(
    (name, settings): (&str, Value),
    model: &dyn Model,
    weights: &mut Weights,
    ancestry: &dyn Ancestry,
    streams: &mut Streams,
    total: usize,
) -> Result<()> {
    let (seed, clock) = (Seed::new(5), Clock::at(total, total));
    let mut defense = defense(name, settings)?;
    defense.finish(&mut StageCx { model, weights, streams, seed, clock, ancestry })
}

/// The same after fine-tuning, without data.
pub fn post(which: (&str, Value), model: &dyn Model, weights: &mut Weights, ancestry: &dyn Ancestry) -> Result<()> {
    finish(which, model, weights, ancestry, &mut Streams::default(), 0)
}

/// The Frobenius norm.
pub fn norm(x: &Tensor) -> Result<f64> {
    Ok(x.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt())
}

/// An orthonormal basis `[out, k]` of the columns of `v`, by Gram and Schmidt.
pub fn basis(v: &Tensor) -> Result<Tensor> {
    let mut found: Vec<Tensor> = Vec::new();
    for column in 0..v.dim(1)? {
        let whole = v.narrow(1, column, 1)?;
        let mut rest = whole.clone();
        // Twice, for the rounding of the first pass.
        for u in found.iter().chain(&found.clone()) {
            rest = (&rest - u.matmul(&u.t()?.matmul(&rest)?)?)?;
        }
        if norm(&rest)? > 1e-9 * norm(v)? {
            found.push((&rest / norm(&rest)?)?);
        }
    }
    Ok(Tensor::cat(&found, 1)?)
}

/// Fails unless two tensors are the same to rounding.
pub fn close(ours: &Tensor, theirs: &Tensor, what: &str) -> Result<()> {
    let gap = difference(ours, theirs)?;
    assert!(gap < 1e-9, "{what}: {gap:e}");
    Ok(())
}

/// Fails unless these neutral settings leave the weights bit for bit, under an adapter and in full.
pub fn check_untouched(name: &str, settings: &Value) -> Result<()> {
    let model = small()?;
    let lineage = TrainedLineage::by_adapter(model.as_ref(), DType::F32)?;
    for start in [TrainedLineage::user, TrainedLineage::user_in_full] {
        let (mut weights, before) = (start(&lineage)?, start(&lineage)?);
        post((name, settings.clone()), model.as_ref(), &mut weights, &lineage)?;
        assert_eq!(bits(&weights)?, bits(&before)?, "{name} {settings}");
        assert_eq!(weights.lora().is_some(), before.lora().is_some());
    }
    Ok(())
}

/// Fails unless half of the alignment's update, which these settings add, stays in f32 beside weights in fewer bits:
/// nothing of it rounds away.
pub fn check_kept_beside_frozen(name: &str, settings: Value) -> Result<()> {
    let model = small()?;
    let lineage = TrainedLineage::by_adapter(model.as_ref(), DType::BF16)?;
    let (mut weights, before) = (lineage.user()?, lineage.user()?);
    post((name, settings), model.as_ref(), &mut weights, &lineage)?;
    let parameter = "model.layers.1.self_attn.q_proj.weight";
    let expected = (dense(&before, parameter)? + (lineage.update(parameter)? * 0.5)?)?;
    assert!(difference(&dense(&weights, parameter)?, &expected)? < 1e-6);
    Ok(())
}
