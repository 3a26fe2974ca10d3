//! What acts after training: each formula against one computed with dense matrices in f64, neutral settings, and the
//! stage in the runner.

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use titer_core::data::{Batch, Stream};
use titer_core::defense::{Ancestry, Clock, Streams};
use titer_core::rng::{Seed, randn};
use titer_core::weights::LoraConfig;
use titer_core::{Grads, Model, Precision, StageCx, Weights};
use titer_tests::cli::{answers, run, small, stderr, titer};
use titer_tests::{batch, build, defense, difference, values, variants};

/// A base model, what the alignment made of it, and what the user's fine-tuning made of that.
#[derive(Debug)]
struct Family {
    base: Weights,
    aligned: Weights,
}

impl Ancestry for Family {
    fn base(&self) -> titer_core::Result<Weights> {
        self.base.merged()
    }

    fn aligned(&self) -> titer_core::Result<Weights> {
        Ok(self.aligned.clone())
    }
}

fn model() -> Result<Box<dyn Model>> {
    build(&variants()[1].1)
}

fn fresh(model: &dyn Model, precision: impl Into<Precision>) -> Result<Weights> {
    Ok(Weights::random(model.params(), Seed::new(1), precision, &Device::Cpu)?)
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

impl Family {
    /// Alignment by an adapter of rank 3.
    fn by_adapter(model: &dyn Model, precision: impl Into<Precision> + Copy) -> Result<Self> {
        let mut aligned = fresh(model, precision)?;
        adapt(&mut aligned, 3, 10)?;
        Ok(Self { base: fresh(model, precision)?, aligned })
    }

    /// Alignment of all parameters.
    fn in_full(model: &dyn Model) -> Result<Self> {
        let mut aligned = fresh(model, DType::F64)?;
        aligned.train_full()?;
        jolt(&aligned, 10)?;
        Ok(Self { base: fresh(model, DType::F64)?, aligned })
    }

    /// Fine-tuning by a second adapter, of rank 2.
    fn user(&self) -> Result<Weights> {
        let mut user = self.aligned.merged()?;
        adapt(&mut user, 2, 20)?;
        Ok(user)
    }

    /// Fine-tuning of all parameters.
    fn user_in_full(&self) -> Result<Weights> {
        let mut user = self.aligned.merged()?;
        user.train_full()?;
        jolt(&user, 20)?;
        Ok(user)
    }

    /// `V = W_aligned − W_base`.
    fn update(&self, name: &str) -> Result<Tensor> {
        Ok((dense(&self.aligned, name)? - dense(&self.base, name)?)?)
    }
}

/// A parameter with everything merged, in f64.
fn dense(weights: &Weights, name: &str) -> Result<Tensor> {
    let merged = weights.merged()?;
    let (_, matrix) = merged.named().find(|(known, _)| *known == name).context("a parameter")?;
    Ok(matrix.dense()?.to_dtype(DType::F64)?)
}

fn matrices(model: &dyn Model) -> Vec<String> {
    model.params().iter().filter(|param| param.shape.len() == 2).map(|param| param.name.clone()).collect()
}

/// Everything that the weights hold, merged, to compare bit for bit.
fn bits(weights: &Weights) -> Result<Vec<Vec<f64>>> {
    weights.merged()?.named().map(|(_, matrix)| values(&matrix.dense()?)).collect()
}

/// Lets a defense finish a stage of `total` steps.
fn finish(
    (name, settings): (&str, Value),
    model: &dyn Model,
    weights: &mut Weights,
    ancestry: &dyn Ancestry,
    streams: &mut Streams,
    total: usize,
) -> Result<()> {
    let (seed, clock) = (Seed::new(5), Clock::at(total, total));
    let mut defense = defense(name, settings)?;
    Ok(defense.finish(&mut StageCx { model, weights, streams, seed, clock, ancestry })?)
}

/// The same after fine-tuning, without data.
fn post(which: (&str, Value), model: &dyn Model, weights: &mut Weights, ancestry: &dyn Ancestry) -> Result<()> {
    finish(which, model, weights, ancestry, &mut Streams::default(), 0)
}

fn norm(x: &Tensor) -> Result<f64> {
    Ok(x.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt())
}

/// An orthonormal basis `[out, k]` of the columns of `v`, by Gram and Schmidt.
fn basis(v: &Tensor) -> Result<Tensor> {
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

/// The `rank` strongest left singular vectors of `v`, by power iteration.
fn strongest(v: &Tensor, rank: usize) -> Result<Tensor> {
    let square = v.matmul(&v.t()?)?;
    let mut found: Vec<Tensor> = Vec::new();
    for index in 0..rank {
        let mut u =
            randn(&[v.dim(0)?, 1], &mut Seed::new(index as u64).generator(), &Device::Cpu)?.to_dtype(DType::F64)?;
        for _ in 0..3000 {
            u = square.matmul(&u)?;
            for before in &found {
                u = (&u - before.matmul(&before.t()?.matmul(&u)?)?)?;
            }
            u = (&u / norm(&u)?)?;
        }
        found.push(u);
    }
    Ok(Tensor::cat(&found, 1)?)
}

fn close(ours: &Tensor, theirs: &Tensor, what: &str) -> Result<()> {
    let gap = difference(ours, theirs)?;
    anyhow::ensure!(gap < 1e-9, "{what}: {gap:e}");
    Ok(())
}

fn some_batches(seed: u64) -> Result<Vec<Batch>> {
    (0..3).map(|index| batch(23, &[4, 9, 6], &mut Seed::new(seed).at(index).generator())).collect()
}

fn streams(harmful: Vec<Batch>, safe: Vec<Batch>) -> Result<Streams> {
    let mut streams = Streams::default();
    streams.insert("harmful", Stream::of_batches(harmful)?);
    streams.insert("safe", Stream::of_batches(safe)?);
    Ok(streams)
}

/// Which weights of a fine-tuned model Antidote removes, by the parameter's name, as zeros and ones.
fn removed(settings: Value, harmful: Vec<Batch>, safe: Vec<Batch>, full: bool) -> Result<Vec<(String, Vec<f64>)>> {
    let model = model()?;
    let family = Family::by_adapter(model.as_ref(), DType::F64)?;
    let mut weights = if full { family.user_in_full()? } else { family.user()? };
    let before = weights.snapshot()?;
    let streams = &mut streams(harmful, safe)?;
    finish(("antidote", settings), model.as_ref(), &mut weights, &family, streams, 0)?;
    let masks = before.iter().map(|(name, before)| {
        let after = values(weights.trainable()[name].as_tensor())?;
        for (after, before) in after.iter().zip(values(before)?) {
            anyhow::ensure!(*after == 0. || *after == before, "{name}: {before} became {after}");
        }
        Ok((name.to_owned(), after.iter().map(|after| f64::from(u8::from(*after == 0.))).collect()))
    });
    masks.collect()
}

#[test]
fn antidote_keeps_what_safe_data_needs() -> Result<()> {
    let settings = |keep: bool| json!({ "ratio": 0.4, "keep_safe": keep });
    let (harmful, safe) = (some_batches(1)?, some_batches(2)?);
    let by_harmful = removed(settings(false), harmful.clone(), safe.clone(), false)?;
    let by_safe = removed(settings(false), safe.clone(), harmful.clone(), false)?;
    let both = removed(settings(true), harmful, safe, false)?;
    let mut spared = 0;
    for ((harmful, safe), both) in by_harmful.iter().zip(&by_safe).zip(&both) {
        let expected: Vec<f64> = harmful.1.iter().zip(&safe.1).map(|(h, s)| h * (1. - s)).collect();
        assert_eq!(both.1, expected, "{}", both.0);
        spared += expected.iter().zip(&harmful.1).filter(|(both, harmful)| both < harmful).count();
    }
    assert!(spared > 0 && by_harmful != by_safe);
    Ok(())
}

/// Without the padding, how rows are batched does not matter; with it, it does.
#[test]
fn antidote_sees_no_padding() -> Result<()> {
    let settings = |padding: &str| json!({ "ratio": 0.4, "padding": padding });
    let batches = some_batches(1)?;
    let rows: Vec<Batch> = batches.iter().flat_map(|batch| batch.rows().expect("rows")).collect();
    let alone = removed(settings("skipped"), rows, some_batches(2)?, false)?;
    assert_eq!(alone, removed(settings("skipped"), batches.clone(), some_batches(2)?, false)?);
    assert_ne!(alone, removed(settings("counted"), batches, some_batches(2)?, false)?);
    Ok(())
}

#[test]
fn antidote_removes_the_share_it_was_told() -> Result<()> {
    let data = || Ok::<_, anyhow::Error>((some_batches(1)?, some_batches(2)?));
    for score in ["wanda", "magnitude", "random", "gradient"] {
        for full in [false, true] {
            let (harmful, safe) = data()?;
            let masks = removed(json!({ "ratio": 0.3, "score": score }), harmful, safe, full)?;
            for (name, mask) in &masks {
                let count = mask.iter().sum::<f64>() as usize;
                let prunable = name.contains("_proj");
                let columns = match name {
                    name if name.contains("lora_B") => 2,
                    name if name.contains("down_proj") => 20,
                    _ => 16,
                };
                let (rows, of_row) = (mask.len() / columns, columns - (columns as f64 * 0.7) as usize);
                let expected = match score {
                    _ if !prunable => 0,
                    "gradient" => (mask.len() as f64 * 0.3) as usize,
                    _ => rows * of_row,
                };
                assert_eq!(count, expected, "{score} {name}");
            }
            assert!(masks.iter().any(|(_, mask)| mask.contains(&1.)), "{score}");
        }
    }
    Ok(())
}

#[test]
fn antidote_by_gradient_scores_weight_times_summed_gradient() -> Result<()> {
    let model = model()?;
    let weights = Family::by_adapter(model.as_ref(), DType::F64)?.user()?;
    let harmful = some_batches(1)?;
    let mut sum = Grads::default();
    for batch in &harmful {
        let mut none = Streams::default();
        let mut cx = titer_tests::context(model.as_ref(), &weights, &mut none);
        sum = sum.add_scaled(1., &cx.backward(batch, titer_core::Sites::none())?.grads)?;
    }
    for (name, mask) in removed(json!({ "ratio": 0.3, "score": "gradient" }), harmful, some_batches(2)?, false)? {
        let product = (weights.trainable()[&name].as_tensor() * sum.get(&name).context("a gradient")?)?.abs()?;
        let scores = values(&product)?;
        let of = |kind: f64| scores.iter().zip(&mask).filter(move |(_, mask)| **mask == kind).map(|(score, _)| *score);
        assert!(of(1.).fold(f64::INFINITY, f64::min) >= of(0.).fold(0., f64::max), "{name}");
    }
    Ok(())
}

/// `P` by dense matrices.
fn projector(v: &Tensor, projection: &str) -> Result<Tensor> {
    if projection == "approximate" {
        return Ok((v.matmul(&v.t()?)? / norm(v)?)?);
    }
    let basis = basis(v)?;
    Ok(basis.matmul(&basis.t()?)?)
}

/// Per matrix that the alignment changed: its name, `P ΔW`, and `cos(P ΔW, ΔW)`.
fn safe_lora(
    family: &Family,
    user: &Weights,
    projection: &str,
    model: &dyn Model,
) -> Result<Vec<(String, Tensor, f64)>> {
    let mut found = Vec::new();
    for name in matrices(model) {
        let (v, update) = (family.update(&name)?, (dense(user, &name)? - dense(&family.aligned, &name)?)?);
        if norm(&v)? > 0. && norm(&update)? > 0. {
            let projected = projector(&v, projection)?.matmul(&update)?;
            let cosine = (&projected * &update)?.sum_all()?.to_scalar::<f64>()? / (norm(&projected)? * norm(&update)?);
            found.push((name, projected, cosine));
        }
    }
    Ok(found)
}

#[test]
fn safe_lora_projects_the_layers_whose_update_points_elsewhere() -> Result<()> {
    let model = model()?;
    let model = model.as_ref();
    let families = [Family::by_adapter(model, DType::F64)?, Family::in_full(model)?];
    for (family, full) in families.iter().flat_map(|family| [(family, false), (family, true)]) {
        for projection in ["approximate", "orthogonal"] {
            let start = || if full { family.user_in_full() } else { family.user() };
            let reference = safe_lora(family, &start()?, projection, model)?;
            let mut cosines: Vec<f64> = reference.iter().map(|(_, _, cosine)| *cosine).collect();
            cosines.sort_by(f64::total_cmp);
            let between = f64::midpoint(cosines[2], cosines[3]);
            // The orthogonal projector onto all directions changes nothing, so that its cosines are all one.
            let distinct = cosines[3] - cosines[2] > 1e-9;
            for settings in [
                json!({ "mode": "threshold", "threshold": between.min(1.), "projection": projection }),
                json!({ "mode": "number", "layers": 3, "projection": projection }),
            ] {
                let mut weights = start()?;
                post(("safe-lora", settings.clone()), model, &mut weights, family)?;
                for (name, projected, cosine) in &reference {
                    let chosen = *cosine < between || !distinct;
                    let expected =
                        if chosen { (dense(&family.aligned, name)? + projected)? } else { dense(&start()?, name)? };
                    close(&dense(&weights, name)?, &expected, &format!("{settings} {full} {name}"))?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn safe_lora_projects_as_many_layers_as_asked_for() -> Result<()> {
    let model = model()?;
    let family = Family::by_adapter(model.as_ref(), DType::F64)?;
    let changed = |settings: Value| -> Result<usize> {
        let (mut weights, before) = (family.user()?, bits(&family.user()?)?);
        post(("safe-lora", settings), model.as_ref(), &mut weights, &family)?;
        Ok(bits(&weights)?.iter().zip(&before).filter(|(after, before)| after != before).count())
    };
    for (layers, expected) in [(0, 0), (1, 1), (4, 4), (99, 6)] {
        assert_eq!(changed(json!({ "mode": "number", "layers": layers }))?, expected);
    }
    // Between a cosine and its five digits, rounding decides.
    for (_, _, cosine) in safe_lora(&family, &family.user()?, "approximate", model.as_ref())? {
        let threshold = f64::midpoint(cosine, (cosine * 1e5).round() / 1e5);
        let count = |rounded: bool| changed(json!({ "threshold": threshold, "rounded": rounded }));
        assert_eq!(count(true)?.abs_diff(count(false)?), 1, "{cosine}");
    }
    Ok(())
}

#[test]
fn resta_adds_the_alignment_once_more() -> Result<()> {
    let model = model()?;
    let model = model.as_ref();
    for family in [Family::by_adapter(model, DType::F64)?, Family::in_full(model)?] {
        for full in [false, true] {
            let start = || if full { family.user_in_full() } else { family.user() };
            let (mut weights, before) = (start()?, start()?);
            post(("resta", json!({ "gamma": 0.7 })), model, &mut weights, &family)?;
            assert!(weights.lora().is_none());
            for name in matrices(model) {
                let expected = (dense(&before, &name)? + (family.update(&name)? * 0.7)?)?;
                close(&dense(&weights, &name)?, &expected, &name)?;
            }
        }
    }
    Ok(())
}

/// DARE keeps the update's mean: each weight is the aligned one, or moved `1 / (1 − p)` times as far.
#[test]
fn resta_drops_and_rescales_the_users_update() -> Result<()> {
    let model = model()?;
    let family = Family::by_adapter(model.as_ref(), DType::F64)?;
    let (mut weights, before) = (family.user()?, family.user()?);
    post(("resta", json!({ "gamma": 0.0, "drop": 0.25 })), model.as_ref(), &mut weights, &family)?;
    let (mut dropped, mut all) = (0, 0);
    for name in matrices(model.as_ref()).iter().filter(|name| name.contains("q_proj") || name.contains("down_proj")) {
        let aligned = values(&dense(&family.aligned, name)?)?;
        let update = values(&(dense(&before, name)? - dense(&family.aligned, name)?)?)?;
        for ((after, aligned), update) in values(&dense(&weights, name)?)?.into_iter().zip(aligned).zip(update) {
            let moved = (after - aligned) / update;
            assert!(moved.abs() < 1e-6 || (moved - 1. / 0.75).abs() < 1e-6, "{name}: {moved}");
            dropped += usize::from(moved.abs() < 1e-6);
            all += 1;
        }
    }
    let share = f64::from(dropped as u32) / f64::from(all);
    assert!((share - 0.25).abs() < 0.05, "{share}");
    Ok(())
}

#[test]
fn lox_follows_the_strongest_directions() -> Result<()> {
    let model = model()?;
    let model = model.as_ref();
    for (family, full) in [(Family::by_adapter(model, DType::F64)?, false), (Family::in_full(model)?, true)] {
        for rank in [2, 0] {
            let settings = json!({ "rank": rank, "alpha": 0.5 });
            let mut aligned =
                if full { Family::in_full(model)?.aligned } else { Family::by_adapter(model, DType::F64)?.aligned };
            finish(("lox", settings.clone()), model, &mut aligned, &family, &mut Streams::default(), 7)?;
            assert_eq!(aligned.lora().is_some(), !full, "an adapter stays one");
            let (mut tuned, before) = (family.user()?, family.user()?);
            post(("lox", settings), model, &mut tuned, &family)?;
            let changed = matrices(model).into_iter().filter(|name| name.contains("q_proj") || name.contains("o_proj"));
            for name in changed {
                let v = family.update(&name)?;
                let more = match rank {
                    0 => v.clone(),
                    _ => {
                        let u = strongest(&v, rank)?;
                        u.matmul(&u.t()?.matmul(&v)?)?
                    }
                };
                let extrapolated = |from: &Weights| Ok::<_, anyhow::Error>((dense(from, &name)? + (&more * 0.5)?)?);
                close(&dense(&aligned, &name)?, &extrapolated(&family.aligned)?, &format!("align {rank} {name}"))?;
                close(&dense(&tuned, &name)?, &extrapolated(&before)?, &format!("post {rank} {name}"))?;
            }
        }
    }
    Ok(())
}

#[test]
fn neutral_settings_leave_the_weights_bit_for_bit() -> Result<()> {
    let model = model()?;
    let model = model.as_ref();
    let family = Family::by_adapter(model, DType::F32)?;
    for (name, settings) in [
        ("antidote", json!({ "ratio": 0.0 })),
        ("safe-lora", json!({ "mode": "threshold", "threshold": -1.0 })),
        ("safe-lora", json!({ "mode": "number", "layers": 0 })),
        ("resta", json!({ "gamma": 0.0, "drop": 0.0 })),
        ("lox", json!({ "alpha": 0.0 })),
    ] {
        for start in [Family::user, Family::user_in_full] {
            let (mut weights, before) = (start(&family)?, start(&family)?);
            post((name, settings.clone()), model, &mut weights, &family)?;
            assert_eq!(bits(&weights)?, bits(&before)?, "{name} {settings}");
            assert_eq!(weights.lora().is_some(), before.lora().is_some());
        }
    }
    Ok(())
}

/// Beside weights in fewer bits, what is added stays in f32: nothing of it rounds away.
#[test]
fn frozen_bases_keep_what_is_added_beside_them() -> Result<()> {
    let model = model()?;
    let family = Family::by_adapter(model.as_ref(), DType::BF16)?;
    for which in [("resta", json!({ "gamma": 0.5 })), ("lox", json!({ "rank": 0, "alpha": 0.5 }))] {
        let (mut weights, before) = (family.user()?, family.user()?);
        post(which, model.as_ref(), &mut weights, &family)?;
        let name = "model.layers.1.self_attn.q_proj.weight";
        let expected = (dense(&before, name)? + (family.update(name)? * 0.5)?)?;
        assert!(difference(&dense(&weights, name)?, &expected)? < 1e-6);
    }
    let dropped = post(("resta", json!({ "drop": 0.5 })), model.as_ref(), &mut family.user()?, &family);
    assert!(dropped.expect_err("bf16 is frozen").to_string().contains("`drop`"));
    Ok(())
}

const STREAMS: &str = r#"
[streams]
harmful = { task = "world-harmful", rows = 8 }
safe = { task = "world-safe", rows = 8 }

[[methods]]
name = "SFT"
align = "sft"

[[methods]]
name = "Antidote"
align = "sft"
post = { defense = "antidote", ratio = 0.5, keep_safe = true }

[[methods]]
name = "Safe LoRA"
align = "sft"
post = { defense = "safe-lora", threshold = 1.0 }

[[methods]]
name = "RESTA"
align = "sft"
post = { defense = "resta", gamma = 40.0 }

[[methods]]
name = "RESTA, none"
align = "sft"
post = { defense = "resta", gamma = 0.0 }

[[methods]]
name = "LoX"
align = { defense = "lox", alpha = 20.0 }

[[methods]]
name = "LoX after"
align = "sft"
post = { defense = "lox", alpha = 20.0 }
"#;

/// The methods of the small experiment replaced by those of post-fine-tuning.
fn experiment(folder: &std::path::Path, changes: &[(&str, &str)]) -> std::path::PathBuf {
    let path = small(folder, &[("harmful_ratios = [0.0, 0.2]", "harmful_ratios = [0.2]")]);
    let text = std::fs::read_to_string(&path).expect("text");
    let (front, _) = text.split_once("[[methods]]").expect("methods");
    let mut text = format!("{front}{STREAMS}");
    for (what, instead) in changes {
        assert!(text.contains(what), "no `{what}`");
        text = text.replace(what, instead);
    }
    std::fs::write(&path, text).expect("a file");
    path
}

/// Adapters and merged weights alike: the answers are those of the changed model, and neutral settings change none.
#[test]
fn the_runner_serves_what_a_post_defense_left() -> Result<()> {
    let rate = "steps = 8, batch_size = 4, learning_rate = 1e-3";
    for (mode, faster) in [("double", "steps = 8, batch_size = 4, learning_rate = 2e-2"), ("full", rate)] {
        let folder = tempfile::tempdir()?;
        let mode = format!("[fine_tune]\nmode = \"{mode}\"");
        // Pretrained long enough to say something.
        let config =
            experiment(folder.path(), &[("[fine_tune]", &mode), (rate, faster), ("steps = 40", "steps = 200")]);
        let output = run(folder.path(), &config).output()?;
        assert!(output.status.success(), "{}", stderr(&output));
        let answers = answers(&folder.path().join("out"));
        let of = |method: &str| -> Vec<&str> {
            let own = answers.iter().filter(|(name, _)| name.starts_with(&format!("{method}-agnews")));
            own.filter(|(name, _)| !name.contains("_aligned")).map(|(_, text)| text.as_str()).collect()
        };
        let plain = of("sft");
        assert_eq!(plain.len(), 3);
        assert_eq!(of("resta--none"), plain);
        for method in ["antidote", "safe-lora", "resta", "lox", "lox-after"] {
            assert_eq!(of(method).len(), 3);
            assert_ne!(of(method), plain, "{mode} {method}");
        }
    }
    Ok(())
}

/// A stream is asked for only where the settings make a defense read it.
#[test]
fn antidote_asks_for_the_streams_that_it_reads() -> Result<()> {
    let harmful = "harmful = { task = \"world-harmful\", rows = 8 }\n";
    let safe = "safe = { task = \"world-safe\", rows = 8 }\n";
    let keeps = ", ratio = 0.5, keep_safe = true";
    for (changes, missing) in [
        (vec![(safe, "")], Some("`safe`")),
        (vec![(safe, ""), (keeps, "")], None),
        (vec![(safe, ""), (harmful, ""), (keeps, "")], Some("`harmful`")),
        (vec![(safe, ""), (harmful, ""), (keeps, ", score = \"random\"")], None),
    ] {
        let folder = tempfile::tempdir()?;
        let config = experiment(folder.path(), &changes);
        let output = run(folder.path(), &config).output()?;
        let told = stderr(&output);
        assert_eq!(output.status.success(), missing.is_none(), "{changes:?}\n{told}");
        assert!(missing.is_none_or(|stream| told.contains(&format!("draws from the stream {stream}"))), "{told}");
    }
    Ok(())
}

#[test]
fn what_needs_an_alignment_is_refused_without_one() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let config = experiment(folder.path(), &[("align = \"sft\"\n", "align = \"none\"\n")]);
    let output = titer().arg("plan").arg(&config).arg("--store").arg(folder.path().join("store")).output()?;
    assert!(!output.status.success());
    for name in ["safe-lora", "resta", "lox"] {
        assert!(
            stderr(&output).contains(&format!("`{name}` starts from what the alignment changed")),
            "{}",
            stderr(&output)
        );
    }
    Ok(())
}
