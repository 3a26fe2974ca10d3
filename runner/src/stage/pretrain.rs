//! Pretraining from scratch: documents to a model folder in Hugging Face's layout.

use std::sync::Arc;

use candle_core::DType;
use titer_core::data::Stream;
use titer_core::defense::{Orphan, Streams};
use titer_core::device::parse_dtype;
use titer_core::rng::Seed;
use titer_core::text::{Encoder, Template, Tokenizer};
use titer_core::{CausalLm, DefenseEntry, Error, ModelEntry, Result, Settings, Weights, registry};

use super::{RECORD, StageIo, Stages, settings, write_json};
use crate::experiment::spec::PretrainSpec;
use crate::model_folder;
use crate::stage::train_loop::Training;

pub(super) fn run(stages: &Stages, spec: &PretrainSpec, io: &mut StageIo) -> Result<()> {
    let task = stages.task(&spec.data.task)?;
    let vocabulary = task.vocabulary().ok_or_else(|| {
        Error::config(format!("`{}` is natural text, which has no closed vocabulary", spec.data.task.name))
            .key("base.pretrain.data")
            .help("pretrain on a generated language such as `world-text`, or take a checkpoint by `base.path`")
    })?;
    let tokenizer = Tokenizer::word_level(&vocabulary)?;
    let mut sizes = settings(&spec.model).as_map().clone();
    sizes.insert("vocab_size".into(), vocabulary.len().into());
    let model = (registry::find::<ModelEntry>(&spec.model.name)?.build)(&Settings::from(sizes))?;
    let seed = Seed::new(spec.seed).named("pretrain");
    let mut weights = Weights::random(model.params(), seed.named("weights"), DType::F32, &stages.device)?;
    weights.train_full()?;
    let rows = stages.read(&spec.data.task, |task| task.train(spec.data.rows, seed.named("rows")))?;
    let encoder = Encoder { tokenizer, template: Template::new("chat"), max_length: spec.max_length };
    let examples = encoder.examples(&rows)?;
    let data = Stream::new(
        examples.into(),
        spec.optim.batch_size,
        spec.optim.bucket,
        seed.named("data"),
        encoder.tokenizer.pad,
    )?;
    let mut sft = (registry::find::<DefenseEntry>("sft")?.build)(&Settings::empty())?;
    let training = Training {
        model: model.as_ref(),
        weights: &mut weights,
        defense: sft.as_mut(),
        data,
        streams: Streams::default(),
        optim: &spec.optim,
        seed,
        monitor: Vec::new(),
        ancestry: &Orphan,
    };
    let record = training.run(io.watch)?;
    // Later stages load the weights in the type that the configuration asks for; the master copy stays f32.
    parse_dtype(&spec.dtype, &stages.device)?;
    let lm = CausalLm { model: Arc::from(model), tokenizer: encoder.tokenizer, weights };
    model_folder::save(&lm, io.output)?;
    write_json(&io.output.join(RECORD), &record)
}
