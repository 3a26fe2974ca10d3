//! What a training step and a generated token ask of the device, counted: `tests/device-budgets.toml` holds the numbers.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use candle_core::DType;
use serde_json::{Value, json};
use titer_core::data::{Batch, Example};
use titer_core::defense::{Clock, StepCx, Streams};
use titer_core::model::generate::{Decoding, greedy};
use titer_core::optim::{AdamW, AdamWConfig};
use titer_core::rng::Seed;
use titer_core::weights::LoraConfig;
use titer_core::{Model, Weights};
use titer_tests::cli::stderr;
use titer_tests::{build, defense};

use crate::standin::{alone, device, variable};

const FILE: &str = include_str!("../../device-budgets.toml");

/// A count this far below its budget makes the file untrue.
const SLACK: f64 = 0.9;

/// Says how many steps, or tokens, the tests below make.
const REPEAT: &str = "TEST_REPEAT";

fn repeat() -> usize {
    variable(REPEAT).and_then(|number| number.parse().ok()).unwrap_or(1)
}

/// The model of `tests/device-budgets.toml`.
fn model() -> Result<(Box<dyn Model>, Weights)> {
    let model = build(&json!({
        "model_type": "llama", "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1
    }))?;
    let weights = Weights::random(model.params(), Seed::new(1), DType::BF16, &device()?)?;
    Ok((model, weights))
}

fn rows() -> Vec<Vec<u32>> {
    [24, 17].map(|length| (0..length).map(|at| at * 7 % 97).collect()).to_vec()
}

fn steps(method: &str) -> Result<()> {
    let (model, mut weights) = model()?;
    weights.train_lora(&LoraConfig::default(), Seed::new(2))?;
    let examples: Vec<Example> = rows().into_iter().map(|tokens| Example { tokens, first_label: 6 }).collect();
    let batch = Batch::collate(&examples.iter().collect::<Vec<_>>(), 0, &device()?)?;
    let (mut defense, mut optimizer) = (defense(method, Value::Null)?, AdamW::new(AdamWConfig::default()));
    let mut streams = Streams::default();
    for step in 0..repeat() {
        let clock = Clock::at(step, repeat());
        let update =
            defense.step(&mut StepCx::new(model.as_ref(), &weights, &mut streams, Seed::new(3), clock), &batch)?;
        let factor = update.grads.clip_factor(1.)?;
        optimizer.step(&weights, &update.grads, &factor, 1e-3)?;
    }
    Ok(())
}

#[test]
#[ignore = "needs a device: see .ci/device"]
fn steps_of_sft() -> Result<()> {
    steps("sft")
}

#[test]
#[ignore = "needs a device: see .ci/device"]
fn steps_of_vaccine() -> Result<()> {
    steps("vaccine")
}

#[test]
#[ignore = "needs a device: see .ci/device"]
fn tokens() -> Result<()> {
    let (model, weights) = model()?;
    let decoding = Decoding { max_new_tokens: 8 + repeat(), batch_size: 2, ends: Vec::new() };
    let answers = greedy(model.as_ref(), &weights, &rows(), &decoding, |_| Ok(()))?;
    ensure!(answers.iter().all(|answer| answer.tokens.len() == decoding.max_new_tokens));
    Ok(())
}

/// How often what was asked, by the names of the file.
type Counts = BTreeMap<String, u64>;

/// What one of the tests above asks of the device.
fn counted(test: &str, repeat: &str) -> Result<Counts> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("summary.json");
    let output = alone(test, &[(REPEAT, repeat), ("STANDIN_SUMMARY", path.to_str().context("a path")?)])?;
    ensure!(output.status.success(), "{}", stderr(&output));
    let summary: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    let names = ["kernels", "products", "allocations", "waits", "bytes_up", "bytes_down"];
    let count = |name: &str| Ok((name.to_owned(), summary[name].as_u64().with_context(|| format!("no `{name}`"))?));
    names.into_iter().map(count).collect()
}

/// What another step asks for beyond the first, which also loads kernels and makes moments.
fn one_more(test: &str) -> Result<Counts> {
    let (two, three) = (counted(test, "2")?, counted(test, "3")?);
    Ok(three.into_iter().map(|(name, count)| (name.clone(), count - two[&name])).collect())
}

#[test]
#[ignore = "needs the stand-in: see .ci/device"]
fn no_step_costs_more_than_it_may() -> Result<()> {
    let measured = [
        ("sft", one_more("budgets::steps_of_sft")?),
        ("vaccine", one_more("budgets::steps_of_vaccine")?),
        ("token", one_more("budgets::tokens")?),
    ];
    let budgets: BTreeMap<String, Counts> = toml::from_str(FILE)?;
    let mut wrong = Vec::new();
    for (what, counts) in &measured {
        let budget = budgets.get(*what).with_context(|| format!("no table [{what}] in tests/device-budgets.toml"))?;
        ensure!(budget.keys().eq(counts.keys()), "[{what}] has other lines than {:?}", counts.keys());
        println!("[{what}]");
        for (name, &count) in counts {
            println!("{name} = {count}");
            let most = budget[name];
            if count > most {
                wrong.push(format!("{what}.{name} is {count}, and {most} at most is allowed"));
            } else if (count as f64) < SLACK * most as f64 {
                wrong.push(format!("{what}.{name} is {count} only: {most} is out of date"));
            }
        }
    }
    ensure!(
        wrong.is_empty(),
        "{}\nhelp: change the line in tests/device-budgets.toml, and say beside it why it costs more",
        wrong.join("\n")
    );
    Ok(())
}
