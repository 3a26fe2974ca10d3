//! How fast a step or an answer is, on random weights of a named shape or on those of a model's folder.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Device};
use rand::RngExt;
use serde::Serialize;
use serde_json::json;
use titer_core::data::Batch;
use titer_core::defense::{Clock, StepCx, Streams};
use titer_core::device::{device_name, memory_peak, parse_dtype, restart_memory_peak};
use titer_core::model::generate::{Decoding, greedy};
use titer_core::optim::{AdamW, AdamWConfig};
use titer_core::rng::{Seed, randn};
use titer_core::tensor::ops::Gemm;
use titer_core::weights::{LoraConfig, Role};
use titer_core::{CausalLm, DefenseEntry, Error, Model, ModelEntry, Result, Settings, Weights, registry};

use crate::memory::process_peak;

/// The shapes that a model can be asked for by name.
const SHAPES: [Shape; 13] = [
    llama("quickstart", [64, 3, 4, 4, 176], 647, false),
    llama("15m", [288, 6, 6, 6, 768], 32_000, true),
    llama("110m", [768, 12, 12, 12, 2048], 32_000, true),
    llama("1b", [2048, 22, 32, 32, 5632], 32_000, false),
    llama("tinyllama-1.1b", [2048, 22, 32, 4, 5632], 32_000, false),
    llama("llama-2-7b", [4096, 32, 32, 32, 11_008], 32_000, false),
    llama("llama-2-13b", [5120, 40, 40, 40, 13_824], 32_000, false),
    decoder("mistral", "mistral-7b", [4096, 32, 32, 8, 14_336], 32_000, false),
    decoder("qwen2", "qwen2-7b", [3584, 28, 28, 4, 18_944], 152_064, false),
    opt("opt-125m", [768, 12, 12, 3072]),
    opt("opt-1.3b", [2048, 24, 32, 8192]),
    opt("opt-2.7b", [2560, 32, 32, 10_240]),
    opt("opt-6.7b", [4096, 32, 32, 16_384]),
];

/// A named shape: the sizes that all architectures have, and those that only its own has.
struct Shape {
    name: &'static str,
    hidden: usize,
    layers: usize,
    heads: usize,
    inner: usize,
    vocabulary: usize,
    family: ShapeFamily,
}

enum ShapeFamily {
    Decoder { kind: &'static str, key_value: usize, tied: bool },
    Opt,
}

/// `sizes`: width, blocks, heads, key/value heads, inner width of the MLP.
const fn llama(name: &'static str, sizes: [usize; 5], vocabulary: usize, tied: bool) -> Shape {
    decoder("llama", name, sizes, vocabulary, tied)
}

/// The same sizes of any architecture with Llama's keys.
const fn decoder(kind: &'static str, name: &'static str, sizes: [usize; 5], vocabulary: usize, tied: bool) -> Shape {
    let [hidden, layers, heads, key_value, inner] = sizes;
    Shape { name, hidden, layers, heads, inner, vocabulary, family: ShapeFamily::Decoder { kind, key_value, tied } }
}

/// `sizes`: width, blocks, heads, inner width of the MLP.
const fn opt(name: &'static str, sizes: [usize; 4]) -> Shape {
    let [hidden, layers, heads, inner] = sizes;
    Shape { name, hidden, layers, heads, inner, vocabulary: 50_272, family: ShapeFamily::Opt }
}

impl Shape {
    /// The architecture of this shape, with another number of blocks if asked for.
    fn model(&self, layers: Option<usize>) -> Result<Box<dyn Model>> {
        let mut keys = json!({
            "vocab_size": self.vocabulary, "hidden_size": self.hidden, "num_attention_heads": self.heads,
            "num_hidden_layers": layers.unwrap_or(self.layers),
        });
        let (kind, own) = match self.family {
            ShapeFamily::Decoder { kind, key_value, tied } => (
                kind,
                json!({
                    "num_key_value_heads": key_value, "intermediate_size": self.inner, "tie_word_embeddings": tied,
                    "max_position_embeddings": 4096, "initializer_range": 0.02,
                }),
            ),
            ShapeFamily::Opt => {
                ("opt", json!({ "ffn_dim": self.inner, "max_position_embeddings": 2048, "init_std": 0.02 }))
            }
        };
        for (key, value) in own.as_object().into_iter().flatten() {
            keys[key] = value.clone();
        }
        (registry::find::<ModelEntry>(kind)?.build)(&Settings::from(keys.as_object().cloned().unwrap_or_default()))
    }
}

/// The names of all shapes.
pub fn shapes() -> String {
    SHAPES.map(|shape| shape.name).join(", ")
}

/// What to measure on.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Setup {
    /// The shape's name, or the folder.
    pub model: String,
    /// Rows per batch.
    pub batch: usize,
    /// Tokens per row, of the prompt when generating.
    pub length: usize,
    /// Transformer blocks, if other than the shape's own.
    pub layers: Option<usize>,
    /// How the weights are stored.
    pub dtype: String,
    /// Measured repetitions.
    pub repeat: usize,
    /// Repetitions before them.
    pub warmup: usize,
}

/// What was measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Measurement {
    /// What ran: a method's name, or `generate`.
    pub what: String,
    /// On what.
    pub setup: Setup,
    /// The device.
    pub device: String,
    /// Threads of the host.
    pub threads: usize,
    /// Parameters of the model.
    pub parameters: usize,
    /// The median over the repetitions; for `generate` of all answers together.
    pub seconds_per_step: f64,
    /// The fastest repetition.
    pub seconds_min: f64,
    /// Tokens trained on or generated, per second.
    pub tokens_per_second: f64,
    /// The parts of an answer; absent for a step.
    pub parts: Option<AnswerParts>,
    /// The most memory the process held, which did nothing else; on a GPU, what tensors took there.
    pub peak_bytes: Option<u64>,
    /// Arithmetic that the method asks for (no recomputation), per second.
    pub flops_per_second: f64,
    /// The machine's own best on a large matrix product of this type, measured in the same run.
    pub matmul_flops_per_second: f64,
    /// The former over the latter.
    pub share_of_peak: f64,
}

/// The two parts of answering.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct AnswerParts {
    /// Reading the prompts, with the first token of each answer.
    pub prefill: Option<Speed>,
    /// The later tokens of the answers; absent if there are none, or too few to tell their time from that of the prompts.
    pub decode: Option<Speed>,
}

/// How fast tokens are read or written.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Speed {
    /// Per second of the fastest repetition.
    pub tokens_per_second: f64,
    /// Per second that all processors together spent on this process, on average. Other work on the machine disturbs it
    /// less. Absent where the system does not tell.
    pub tokens_per_processor_second: Option<f64>,
}

impl Speed {
    /// Nothing if there are no tokens, or the clock tells no time between beginning and end.
    fn new(tokens: usize, seconds: f64, processor: Option<f64>) -> Option<Self> {
        let per = |seconds: f64| Some(tokens as f64 / seconds).filter(|_| tokens > 0 && seconds > 0.);
        Some(Self { tokens_per_second: per(seconds)?, tokens_per_processor_second: processor.and_then(per) })
    }
}

/// Measures training steps of a defense: forward, backward, clipping, AdamW on a LoRA adapter of rank 8 on all linear
/// layers; three quarters of the positions bear labels.
///
/// # Errors
/// An unknown shape, method or type, or the device failed.
pub fn step(
    setup: &Setup,
    method: &str,
    settings: &Settings,
    dropout: f32,
    checkpointing: bool,
    device: &Device,
) -> Result<Measurement> {
    if setup.length < 2 {
        return Err(Error::config("a row of one token has no label").key("length").help("give 2 or more"));
    }
    let (model, mut weights) = model(setup, device)?;
    let entry = registry::find::<DefenseEntry>(method)?;
    let mut defense = (entry.build)(settings)?;
    let lora = LoraConfig { dropout, ..LoraConfig::default() };
    weights.train_lora(&lora, Seed::new(1))?;
    let batch = random_batch(model.as_ref(), setup, device)?;
    let mut optimizer = AdamW::new(AdamWConfig::default());
    restart_memory_peak(device);
    let (mut passes, mut at) = (0, 0);
    let seconds = measure(setup, device, || {
        let clock = Clock::at(at, setup.warmup + setup.repeat);
        let mut streams = Streams::default();
        let cx = StepCx::new(model.as_ref(), &weights, &mut streams, Seed::new(2), clock);
        let mut cx = cx.with_checkpointing(checkpointing);
        let update = defense.step(&mut cx, &batch)?;
        passes = cx.passes();
        let factor = update.grads.clip_factor(1.)?;
        at += 1;
        optimizer.step(&weights, &update.grads, &factor, 1e-4)
    })?;
    let flops = passes as f64 * flops_per_pass(model.as_ref(), setup, batch.labels());
    let tokens = setup.batch * setup.length;
    measurement(setup, method, &seconds, tokens, flops, model.as_ref(), device)
}

/// Measures greedy answers of `new_tokens` each to `prompts` prompts, all rows going to the end; and answers of one token,
/// whose time is that of reading the prompts.
///
/// # Errors
/// As [`step`].
pub fn generate(setup: &Setup, prompts: usize, new_tokens: usize, device: &Device) -> Result<Measurement> {
    let (model, weights) = model(setup, device)?;
    let (longest, positions) = (setup.length + new_tokens - 1, model.spec().max_positions);
    if longest > positions {
        let message = format!("prompts and answers of {longest} tokens exceed the model's {positions} positions");
        return Err(Error::config(message).key("length").help("lower --length or --new"));
    }
    let vocabulary = model.spec().vocab_size as u32;
    let mut generator = Seed::new(3).generator();
    let mut prompt = || (0..setup.length).map(|_| generator.random_range(0..vocabulary)).collect::<Vec<u32>>();
    let prompts: Vec<Vec<u32>> = (0..prompts).map(|_| prompt()).collect();
    let answer = |max_new_tokens| -> Result<(Vec<f64>, Option<f64>)> {
        let decoding = Decoding { max_new_tokens, batch_size: setup.batch, ends: Vec::new() };
        let begun = processor_seconds();
        let work = || greedy(model.as_ref(), &weights, &prompts, &decoding, |_| Ok(())).map(|_| ());
        let seconds = measure(setup, device, work)?;
        let runs = (setup.warmup + seconds.len()) as f64;
        Ok((seconds, begun.zip(processor_seconds()).map(|(begun, ended)| (ended - begun) / runs)))
    };
    let ((prefill, prefill_processor), (seconds, processor)) = (answer(1)?, answer(new_tokens)?);
    let linear: usize = linear_elements(model.as_ref());
    let tokens = prompts.len() * new_tokens;
    let flops = 2. * (prompts.len() * (setup.length + new_tokens)) as f64 * linear as f64
        + 2. * (tokens * model.spec().vocab_size * model.spec().hidden_size) as f64;
    let later = prompts.len() * new_tokens.saturating_sub(1);
    let later_processor = processor.zip(prefill_processor).map(|(all, prefill)| all - prefill);
    let parts = AnswerParts {
        prefill: Speed::new(prompts.len() * setup.length, prefill[0], prefill_processor),
        decode: Speed::new(later, seconds[0] - prefill[0], later_processor),
    };
    let measured = measurement(setup, "generate", &seconds, tokens, flops, model.as_ref(), device)?;
    Ok(Measurement { parts: Some(parts), ..measured })
}

/// The model that is measured: of a named shape with random weights, or of a folder with its own.
fn model(setup: &Setup, device: &Device) -> Result<(Arc<dyn Model>, Weights)> {
    let precision = parse_dtype(&setup.dtype, device)?;
    if let Some(shape) = SHAPES.iter().find(|shape| shape.name == setup.model) {
        let model = shape.model(setup.layers)?;
        let weights = Weights::random(model.params(), Seed::new(0), precision, device)?;
        return Ok((Arc::from(model), weights));
    }
    let folder = Path::new(&setup.model);
    if !folder.is_dir() {
        let message = format!("`{}` is neither a known shape nor a folder", setup.model);
        return Err(Error::config(message)
            .key("model")
            .help(format!("use a model's folder, its name on the hub (owner/name), or {}", shapes())));
    }
    if setup.layers.is_some() {
        let error = Error::config("a model of a folder has the blocks that its weights are for").key("layers");
        return Err(error.help("leave `--layers` out, or use a shape"));
    }
    let lm = CausalLm::open(folder, precision, device)?;
    Ok((lm.model, lm.weights))
}

fn random_batch(model: &dyn Model, setup: &Setup, device: &Device) -> Result<Batch> {
    let (vocabulary, mut generator) = (model.spec().vocab_size as u32, Seed::new(4).generator());
    let mut row = || (0..setup.length).map(|_| generator.random_range(0..vocabulary)).collect::<Vec<u32>>();
    let rows: Vec<Vec<u32>> = (0..setup.batch).map(|_| row()).collect();
    let first = (setup.length / 4).max(1);
    let labels = rows
        .iter()
        .enumerate()
        .flat_map(|(row, tokens)| tokens.iter().enumerate().skip(first).map(move |(at, &label)| (row, at - 1, label)));
    Batch::with_labels(&rows, labels.collect::<Vec<_>>(), 0, device)
}

/// Seconds of each measured repetition, sorted.
fn measure(setup: &Setup, device: &Device, mut work: impl FnMut() -> Result<()>) -> Result<Vec<f64>> {
    let mut seconds = Vec::with_capacity(setup.repeat);
    for repetition in 0..setup.warmup + setup.repeat.max(1) {
        device.synchronize()?;
        let begun = Instant::now();
        work()?;
        device.synchronize()?;
        if repetition >= setup.warmup {
            seconds.push(begun.elapsed().as_secs_f64());
        }
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds)
}

/// Seconds that all processors together spent on this process; `None` where the system does not tell.
fn processor_seconds() -> Option<f64> {
    // Behind the name in brackets, fields 12 and 13 are the time in the program and in the system, in hundredths of a second.
    let text = std::fs::read_to_string("/proc/self/stat").ok()?;
    let fields = text.rsplit_once(')')?.1.split_whitespace().skip(11).take(2);
    let ticks: Vec<f64> = fields.map_while(|field| field.parse().ok()).collect();
    (ticks.len() == 2).then(|| ticks.iter().sum::<f64>() / 100.)
}

/// Elements of all linear layers but the head.
fn linear_elements(model: &dyn Model) -> usize {
    let linear = model.params().iter().filter(|param| param.role == Role::Linear);
    linear.map(|param| param.shape.iter().product::<usize>()).sum()
}

/// Multiplications and additions of one forward and backward pass over a frozen model: each product twice (its result
/// and the gradient of its input), attention thrice, the head at label positions.
fn flops_per_pass(model: &dyn Model, setup: &Setup, labels: usize) -> f64 {
    let spec = model.spec();
    let tokens = (setup.batch * setup.length) as f64;
    let products = 2. * 2. * tokens * linear_elements(model) as f64;
    let head = 2. * 2. * labels as f64 * (spec.vocab_size * spec.hidden_size) as f64;
    let pairs = (setup.batch * setup.length * (setup.length + 1) / 2 * spec.layers) as f64;
    products + head + 3. * 4. * pairs * spec.hidden_size as f64
}

/// Operations per second of the best of several large products.
fn matmul_peak(dtype: DType, device: &Device) -> Result<f64> {
    let size = if device.is_cpu() { 2048 } else { 8192 };
    let matrix =
        |seed| -> Result<_> { Ok(randn(&[size, size], &mut Seed::new(seed).generator(), device)?.to_dtype(dtype)?) };
    let (a, b) = (matrix(5)?, matrix(6)?);
    let setup =
        Setup { model: String::new(), batch: 0, length: 0, layers: None, dtype: String::new(), repeat: 8, warmup: 2 };
    let seconds = measure(&setup, device, || Gemm::NT.product(&a, &b).map(|_| ()))?;
    Ok(2. * (size as f64).powi(3) / seconds[0])
}

fn measurement(
    setup: &Setup,
    what: &str,
    seconds: &[f64],
    tokens: usize,
    flops: f64,
    model: &dyn Model,
    device: &Device,
) -> Result<Measurement> {
    let median = seconds[seconds.len() / 2];
    // Memory first: the peak of the machine needs some of its own.
    let peak_bytes = if device.is_cpu() { process_peak() } else { memory_peak(device) };
    let peak = matmul_peak(parse_dtype(&setup.dtype, device)?.activation_dtype(device), device)?;
    Ok(Measurement {
        what: what.to_owned(),
        setup: setup.clone(),
        device: device_name(device),
        threads: rayon::current_num_threads(),
        parameters: model.params().count(),
        seconds_per_step: median,
        seconds_min: seconds[0],
        tokens_per_second: tokens as f64 / median,
        parts: None,
        peak_bytes,
        flops_per_second: flops / median,
        matmul_flops_per_second: peak,
        share_of_peak: flops / median / peak,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The published counts, and products that leave out tables, norms, biases and the head, tied or not.
    #[test]
    fn shapes_are_those_of_the_published_models() -> Result<()> {
        for (name, parameters, products) in [
            ("tinyllama-1.1b", 1_100_048_384, 968_884_224),
            ("llama-2-7b", 6_738_415_616, 6_476_005_376),
            ("llama-2-13b", 13_015_864_320, 12_687_769_600),
            ("mistral-7b", 7_241_732_096, 6_979_321_856),
            ("qwen2-7b", 7_615_616_512, 6_525_288_448),
            ("opt-125m", 125_239_296, 84_934_656),
            ("opt-1.3b", 1_315_758_080, 1_207_959_552),
            ("opt-2.7b", 2_651_596_800, 2_516_582_400),
            ("opt-6.7b", 6_658_473_984, 6_442_450_944),
        ] {
            let model = SHAPES.iter().find(|shape| shape.name == name).expect(name).model(None)?;
            assert_eq!((model.params().count(), linear_elements(model.as_ref())), (parameters, products), "{name}");
        }
        Ok(())
    }

    #[test]
    fn what_is_no_shape_and_no_folder_names_the_known_shapes() {
        let setup =
            Setup { model: "14m".into(), batch: 1, length: 8, layers: None, dtype: "f32".into(), repeat: 1, warmup: 0 };
        let error = model(&setup, &Device::Cpu).expect_err("no such shape");
        assert!(error.to_string().contains("15m"), "{error}");
    }
}
