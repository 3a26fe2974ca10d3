//! Properties that hold for any input: mixtures, adapters, resuming.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::{DType, Device};
use proptest::prelude::*;
use titer::experiment::spec::{OptimSpec, Steps};
use titer::stage::train_loop::{TrainRecord, Training, Watch};
use titer_core::data::{Batch, Example, Stream, harmful_count, mixture};
use titer_core::defense::{Clock, Orphan, StepCx, Streams};
use titer_core::optim::Schedule;
use titer_core::rng::{Seed, permutation};
use titer_core::{DefenseEntry, Forward, Grads, Row, Sites, Weights, registry};
use titer_tests::{adapt, all_tiny, batch, build, context, defense, difference, tiny, values, variants};

fn lengths() -> impl Strategy<Value = Vec<usize>> {
    proptest::collection::vec(1usize..12, 1..5)
}

fn same(a: &Grads, b: &Grads) -> Result<bool> {
    let equal = |(name, tensor): (&str, &candle_core::Tensor)| -> Result<bool> {
        Ok(values(tensor)? == values(b.get(name).context("the same names")?)?)
    };
    Ok(a.len() == b.len() && a.iter().map(equal).collect::<Result<Vec<_>>>()?.into_iter().all(|same| same))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// A configuration that is written out and read again is the same, and so is its plan.
    #[test]
    fn a_configuration_survives_the_round_trip(
        seeds in proptest::collection::btree_set(0u64..1 << 40, 1..4),
        ratios in proptest::collection::vec(0f64..=1., 1..4),
        rate in 1e-6f64..1.,
        samples in 1usize..5000,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = titer_tests::cli::small(folder.path(), &[]);
        let overrides = [
            format!("seeds={:?}", seeds.iter().collect::<Vec<_>>()),
            format!("fine_tune.harmful_ratios={ratios:?}"),
            format!("fine_tune.train.learning_rate={rate:?}"),
            format!("fine_tune.samples={samples}"),
        ];
        let first = titer::experiment::config::Config::load(&path, &overrides).unwrap();
        let again = folder.path().join("again.toml");
        std::fs::write(&again, toml::to_string(&first.config).unwrap()).unwrap();
        let second = titer::experiment::config::Config::load(&again, &[]).unwrap();
        prop_assert_eq!(&first.config, &second.config);
        prop_assert_eq!(second.config.seeds, seeds.into_iter().collect::<Vec<_>>());
        prop_assert_eq!(second.config.fine_tune.harmful_ratios, ratios);
        prop_assert_eq!(second.config.fine_tune.train.learning_rate, rate);
    }

    /// A mixture has exactly the rows that were asked for.
    #[test]
    fn a_mixture_has_the_asked_counts(total in 1usize..200, p in 0f64..=1., seed: u64) {
        let rows = |word: &str| (0..200).map(|i| Row::new(format!("{word} {i}"), "")).collect::<Vec<_>>();
        let mixed = mixture(&rows("user"), &rows("harmful"), total, p, Seed::new(seed)).unwrap();
        let harmful = mixed.iter().filter(|row| row.instruction.starts_with("harmful")).count();
        prop_assert_eq!(mixed.len(), total);
        prop_assert_eq!(harmful, harmful_count(total, p).unwrap());
        prop_assert!((harmful as f64 - p * total as f64).abs() <= 0.5);
        let distinct: std::collections::BTreeSet<_> = mixed.iter().collect();
        prop_assert_eq!(distinct.len(), total);
    }

    /// One epoch of a stream has every example once, whatever the bucketing.
    #[test]
    fn an_epoch_has_every_example_once(count in 1usize..60, size in 1usize..9, bucket in 1usize..5, seed: u64) {
        let examples: Vec<Example> =
            (0..count).map(|i| Example { tokens: vec![i as u32; 2 + i % 7], first_label: 1 }).collect();
        let mut stream = Stream::new(examples.into(), size, bucket, Seed::new(seed), 0).unwrap();
        let mut seen = Vec::new();
        for _ in 0..stream.batches_per_epoch() {
            let batch = stream.next_batch(&Device::Cpu).unwrap();
            let ids = batch.tokens.ids.to_vec1::<u32>().unwrap();
            seen.extend(batch.tokens.ranges().map(|range| ids[range.start]));
        }
        seen.sort_unstable();
        prop_assert_eq!(seen, (0..count as u32).collect::<Vec<_>>());
    }

    /// A batch collated ahead is the one that would have come, also around a jump to another place.
    #[test]
    fn a_batch_collated_ahead_is_the_next_one(count in 1usize..20, size in 1usize..5, drawn in 0usize..30, ahead: [bool; 4]) {
        let examples: Vec<Example> =
            (0..count).map(|i| Example { tokens: vec![i as u32; 2 + i % 7], first_label: 1 }).collect();
        let stream = || Stream::new(examples.clone().into(), size, 1, Seed::new(1), 0).unwrap();
        let (mut plain, mut eager) = (stream(), stream());
        eager.prefetch(&Device::Cpu).unwrap();
        plain.seek(drawn);
        eager.seek(drawn);
        for ahead in ahead {
            if ahead {
                eager.prefetch(&Device::Cpu).unwrap();
                prop_assert_eq!(plain.drawn(), eager.drawn());
            }
            let [a, b] = [&mut plain, &mut eager].map(|s| s.next_batch(&Device::Cpu).unwrap().tokens.ids);
            prop_assert_eq!(a.to_vec1::<u32>().unwrap(), b.to_vec1::<u32>().unwrap());
        }
    }

    /// Rows of any lengths in one batch, padded or not, give loss and gradients that are the mean of each row's on its own,
    /// weighed by its labels.
    #[test]
    fn a_batch_is_the_mean_of_its_rows(lengths in lengths(), seed: u64) {
        let (model, mut weights) = tiny(DType::F64, 0.).unwrap();
        weights.train_full().unwrap();
        // A row of one token has nothing to predict, and a batch needs a label.
        let rows: Vec<Vec<u32>> = lengths.iter().map(|length| length + 1).enumerate().map(|(row, length)| {
            (0..length).map(|at| ((seed % 19) as usize + 7 * at + 3 * row) as u32 % 23).collect()
        }).collect();
        let labelled = |rows: &[Vec<u32>]| {
            let labels: Vec<(usize, usize, u32)> = rows.iter().enumerate()
                .flat_map(|(row, tokens)| (1..tokens.len()).map(move |at| (row, at - 1, tokens[at]))).collect();
            Batch::with_labels(rows, labels, 1, &Device::Cpu).unwrap()
        };
        let mut streams = Streams::default();
        let mut pass = |batch: &Batch| {
            let pass = context(model.as_ref(), &weights, &mut streams).backward(batch, Sites::none()).unwrap();
            (batch.labels() as f64, pass)
        };
        let batch = labelled(&rows);
        let ((labels, together), (_, padded)) = (pass(&batch), pass(&batch.padded(None).unwrap()));
        let (mut loss, mut grads) = (0., Grads::default());
        for row in rows.chunks(1) {
            let (count, alone) = pass(&labelled(row));
            loss += alone.loss.value().unwrap() * count / labels;
            grads = grads.add_scaled(count / labels, &alone.grads).unwrap();
        }
        for other in [&together, &padded] {
            prop_assert!((loss - other.loss.value().unwrap()).abs() < 1e-12);
        }
        for (name, gradient) in together.grads.iter() {
            for other in [&grads, &padded.grads] {
                let gap = difference(gradient, other.get(name).unwrap()).unwrap();
                prop_assert!(gap < 1e-11, "{} differs by {}", name, gap);
            }
        }
    }

    /// Merging an adapter changes nothing in what the model computes.
    #[test]
    fn a_merged_adapter_computes_the_same(lengths in lengths(), seed: u64, which in 0..variants().len()) {
        let config = &variants()[which].1;
        let model = build(config).unwrap();
        let mut weights = Weights::random(model.params(), Seed::new(seed), DType::F32, &Device::Cpu).unwrap();
        adapt(&mut weights, 0.).unwrap();
        let batch = batch(23, &lengths, &mut Seed::new(seed).generator()).unwrap();
        let hidden = |weights: &Weights| {
            model.hidden(&batch.tokens, &mut Forward::new(weights, &mut Sites::none())).unwrap().tensor().clone()
        };
        let gap = difference(&hidden(&weights), &hidden(&weights.merged().unwrap())).unwrap();
        prop_assert!(gap < 1e-4, "differs by {gap:.1e}");
    }
}

/// Law 1 for a step that fails inside `scratch`; the conformance suite holds every defense's step to it.
#[test]
fn scratch_weights_are_restored_after_an_error() -> Result<()> {
    for (model, weights) in all_tiny(DType::F32, 0.)? {
        let batch = batch(23, &[7, 4], &mut Seed::new(5).generator())?;
        let before = weights.snapshot()?;
        let mut streams = Streams::default();
        let clock = Clock::at(0, 1);
        let mut cx = StepCx::new(model.as_ref(), &weights, &mut streams, Seed::new(0), clock);
        let failed = cx.scratch(|scratch| {
            scratch.shift(&before, 0.37)?;
            let moved = scratch.backward(&batch, Sites::none())?;
            assert!(moved.loss.value()?.is_finite());
            scratch.next("no such stream").map(|_| ())
        });
        assert!(failed.is_err());
        assert!(same(&before, &weights.snapshot()?)?, "after an error");
    }
    Ok(())
}

/// Accumulated batches train as one batch of all their rows, whatever the lengths of the rows: the stage's own and those
/// of a stream.
#[test]
fn accumulation_equals_the_joint_batch() -> Result<()> {
    let json = |text: &str| serde_json::from_str::<serde_json::Value>(text);
    for (name, given) in [
        ("sft", "{}"),
        ("vlguard", r#"{ "algorithm": "weighted", "lambda": 0.7 }"#),
        ("lisa", r#"{ "rho": 0.5, "align_steps": 2, "fine_tune_steps": 2, "warmup": 0.0 }"#),
        ("lisa", r#"{ "align_steps": 1, "fine_tune_steps": 0 }"#),
        ("ewc", r#"{ "lambda": 3.0 }"#),
        ("kl", r#"{ "lambda": 0.7 }"#),
        ("ldifs", r#"{ "rho": 2.0 }"#),
        ("constrained-sft", "{}"),
        ("vaccine", r#"{ "norm": "sample" }"#),
        ("tar", r#"{ "lambda": 0.0, "inner_steps": 1, "test_every": 1 }"#),
    ] {
        let trained = |batch_size: usize, accumulate: usize| -> Result<Vec<f64>> {
            let (model, mut weights) = tiny(DType::F64, 0.)?;
            let (bucket, steps, clip) = (1, Steps::Steps(4), Some(1.));
            let optim = OptimSpec { batch_size, accumulate, bucket, steps, clip, ..optim() };
            let mut streams = Streams::default();
            for (seed, stream) in (30..).zip(["safe", "harmful", "harmful_held_out"]) {
                streams.insert(stream, rows(&optim, seed)?);
            }
            let mut defense = defense(name, json(given)?)?;
            let training = Training {
                model: model.as_ref(),
                weights: &mut weights,
                defense: defense.as_mut(),
                data: rows(&optim, 8)?,
                streams,
                optim: &optim,
                seed: Seed::new(9),
                monitor: Vec::new(),
                ancestry: &Orphan,
            };
            Ok(training.run(&mut Quiet::default())?.loss)
        };
        let (joint, split) = (trained(4, 1)?, trained(1, 4)?);
        for (step, (joint, split)) in joint.iter().zip(&split).enumerate() {
            assert!((joint - split).abs() < 1e-6, "{name} {given}, step {step}: {joint} and {split}");
        }
    }
    Ok(())
}

/// Eight rows of unequal lengths.
fn rows(optim: &OptimSpec, seed: u64) -> Result<Stream> {
    let mut generator = Seed::new(seed).generator();
    let lengths = permutation(8, &mut generator);
    let tokens = |length: usize| (0..3 + length).map(|at| ((length * 5 + at * 3) as u64 + seed) as u32 % 23).collect();
    let examples: Vec<Example> =
        lengths.into_iter().map(|length| Example { tokens: tokens(length), first_label: 1 + length % 2 }).collect();
    Ok(Stream::new(examples.into(), optim.batch_size, optim.bucket, Seed::new(seed), 0)?)
}

/// Law 2: stopped after any step and resumed, the result is the same to the last bit.
#[test]
fn a_resumed_stage_equals_an_uninterrupted_one() -> Result<()> {
    for name in ["sft", "vaccine", "random-perturbation"] {
        let (model, mut weights) = tiny(DType::F32, 0.1)?;
        let whole = train(model.as_ref(), &mut weights, name, &optim(), &mut Quiet::default())?;
        let expected = weights.snapshot()?;
        for stops in [vec![1], vec![6], vec![2, 3, 7]] {
            let folder = tempfile::tempdir()?;
            let mut watch = Quiet { folder: Some(folder.path().to_owned()), ..Quiet::default() };
            for stop in &stops {
                let (model, mut weights) = tiny(DType::F32, 0.1)?;
                watch.stop_at = Some(*stop);
                let stopped = train(model.as_ref(), &mut weights, name, &optim(), &mut watch);
                let error = stopped.expect_err("it was told to stop");
                assert_eq!(error.kind(), titer_core::Kind::Interrupted, "{error}");
            }
            let (model, mut weights) = tiny(DType::F32, 0.1)?;
            watch.stop_at = None;
            let resumed = train(model.as_ref(), &mut weights, name, &optim(), &mut watch)?;
            assert!(same(&expected, &weights.snapshot()?)?, "{name}, stopped at {stops:?}");
            assert_eq!(resumed.loss, whole.loss, "{name}, stopped at {stops:?}");
            assert_eq!(resumed.scalars, whole.scalars);
            assert_eq!(resumed.passes, whole.passes);
        }
    }
    Ok(())
}

/// A defense that moves the weights behind the loop's back is found out.
#[test]
fn a_step_that_changes_weights_is_an_error() -> Result<()> {
    #[derive(Debug)]
    struct Meddler;
    impl titer_core::AlignmentDefense for Meddler {
        fn step(&mut self, cx: &mut StepCx, batch: &titer_core::data::Batch) -> titer_core::Result<titer_core::Update> {
            let pass = cx.backward(batch, Sites::none())?;
            let moved = cx.weights().snapshot()?.scale(1.01)?;
            cx.weights().set(&moved)?;
            Ok(pass.into())
        }
    }
    let (model, mut weights) = tiny(DType::F32, 0.)?;
    let optim = optim();
    let training = Training {
        model: model.as_ref(),
        weights: &mut weights,
        defense: &mut Meddler,
        data: stream(&optim)?,
        streams: Streams::default(),
        optim: &optim,
        seed: Seed::new(9),
        monitor: Vec::new(),
        ancestry: &Orphan,
    };
    let error = training.run(&mut Quiet::default()).expect_err("a broken law");
    assert!(error.to_string().contains("changed the weights"), "{error}");
    Ok(())
}

fn optim() -> OptimSpec {
    OptimSpec {
        steps: Steps::Steps(9),
        batch_size: 3,
        accumulate: 1,
        bucket: 2,
        learning_rate: 0.01,
        schedule: Schedule::Cosine,
        warmup: 0.2,
        weight_decay: 0.1,
        betas: [0.9, 0.999],
        eps: 1e-8,
        clip: Some(1.),
        checkpointing: false,
    }
}

fn stream(optim: &OptimSpec) -> Result<Stream> {
    let mut generator = Seed::new(8).generator();
    let tokens = |i: usize| (0..3 + i % 5).map(|j| ((i * 5 + j * 3) % 23) as u32).collect();
    let examples: Vec<Example> = permutation(8, &mut generator)
        .into_iter()
        .map(|i| Example { tokens: tokens(i), first_label: 1 + i % 2 })
        .collect();
    Ok(Stream::new(examples.into(), optim.batch_size, optim.bucket, Seed::new(7), 0)?)
}

fn train(
    model: &dyn titer_core::Model,
    weights: &mut Weights,
    name: &str,
    optim: &OptimSpec,
    watch: &mut Quiet,
) -> titer_core::Result<TrainRecord> {
    let mut defense = defense(name, serde_json::json!({})).expect("a defense");
    let training = Training {
        model,
        weights,
        defense: defense.as_mut(),
        data: stream(optim).expect("a stream"),
        streams: Streams::default(),
        optim,
        seed: Seed::new(9),
        monitor: Vec::new(),
        ancestry: &Orphan,
    };
    training.run(watch)
}

/// Stops when told, and keeps the last checkpoint in a folder.
#[derive(Default)]
struct Quiet {
    folder: Option<PathBuf>,
    stop_at: Option<usize>,
    done: usize,
}

impl Watch for Quiet {
    fn started(&mut self, _total: usize, resumed: usize) {
        self.done = resumed;
    }
    fn step(&mut self, step: usize, _loss: Option<f64>) {
        self.done = step;
    }
    fn answered(&mut self, _done: usize) {}
    fn must_stop(&self) -> bool {
        self.stop_at == Some(self.done)
    }
    fn checkpoint_due(&self) -> bool {
        false
    }
    fn save(&mut self, _step: usize, write: &dyn Fn(&Path) -> titer_core::Result<()>) -> titer_core::Result<()> {
        write(self.folder.as_deref().expect("a folder"))
    }
    fn resume(&self) -> Option<PathBuf> {
        self.folder.clone().filter(|folder| folder.join("position.json").is_file())
    }
}

/// Gradient checkpointing changes memory and time, not one bit of the numbers; dropout, perturbations and site
/// gradients included.
#[test]
fn checkpointing_changes_no_bit() -> Result<()> {
    for (model, weights) in all_tiny(DType::F32, 0.2)? {
        let batch = batch(23, &[7, 4, 9], &mut Seed::new(5).generator())?;
        for entry in ["sft", "vaccine", "random-perturbation", "sam"].map(registry::find::<DefenseEntry>) {
            let entry = entry?;
            let update = |on: bool| -> Result<titer_core::Update> {
                let mut streams = Streams::default();
                let mut cx = titer_tests::context(model.as_ref(), &weights, &mut streams).with_checkpointing(on);
                Ok(defense(entry.name, (entry.settings.defaults)())?.step(&mut cx, &batch)?)
            };
            let (plain, checkpointed) = (update(false)?, update(true)?);
            assert!(!plain.grads.is_empty());
            assert!(same(&plain.grads, &checkpointed.grads)?, "{}", entry.name);
            assert_eq!(plain.loss.value()?, checkpointed.loss.value()?);
        }
    }
    Ok(())
}

/// A loss of a defense's own, here the cross-entropy itself, has the gradients of the built-in pass, and one that
/// nothing reaches is an error.
#[test]
fn a_loss_of_ones_own_is_differentiated() -> Result<()> {
    let (model, weights) = tiny(DType::F64, 0.2)?;
    let batch = batch(23, &[7, 4, 9], &mut Seed::new(5).generator())?;
    let site = "layer.0.attn_out";
    let mut streams = Streams::default();
    let mut cx = titer_tests::context(model.as_ref(), &weights, &mut streams);
    let built_in = cx.backward(&batch, Sites::none())?;
    let (hidden, observed) = cx.hidden(&batch.tokens, Sites::none().observe([site]))?;
    let loss = cx.cross_entropy(&hidden, &batch)?;
    let grads = cx.backward_loss(&loss)?;
    assert_eq!(grads.len(), built_in.grads.len());
    for (name, gradient) in grads.iter() {
        let gap = difference(gradient, built_in.grads.get(name).expect("a gradient"))?;
        assert!(gap < 1e-12, "{name} differs by {gap:.1e}");
    }
    assert!(cx.backward_loss(&loss).is_err(), "the pass is used up");
    // A loss on an activation reaches what lies below it, and nothing above.
    let (_, activation) = cx.hidden(&batch.tokens, Sites::none().observe([site]))?;
    let grads = cx.backward_loss(&activation[site].sqr()?.sum_all()?)?;
    assert!(grads.iter().all(|(name, _)| name.contains("layers.0.self_attn")), "{grads:?}");
    assert_eq!(observed[site].dims(), activation[site].dims());
    Ok(())
}
