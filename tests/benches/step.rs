//! One step of the quickstart's stages, on one thread: `RAYON_NUM_THREADS=1 CANDLE_NUM_THREADS=1 cargo bench`.

use candle_core::{DType, Device};
use criterion::{Criterion, criterion_group, criterion_main};
use serde_json::json;
use titer_core::optim::{AdamW, AdamWConfig};
use titer_core::rng::Seed;
use titer_core::weights::LoraConfig;
use titer_core::{Model, Weights};
use titer_tests::{batch, build, defense, step};

/// The quickstart's model.
fn model() -> Box<dyn Model> {
    let config = json!({
        "model_type": "llama", "vocab_size": 647, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": 64
    });
    build(&config).expect("a model")
}

fn steps(criterion: &mut Criterion) {
    let model = model();
    for (name, rows, method) in [("pretrain", 16, "sft"), ("sft", 8, "sft"), ("vaccine", 8, "vaccine")] {
        let mut weights = Weights::random(model.params(), Seed::new(1), DType::F32, &Device::Cpu).expect("weights");
        if name == "pretrain" {
            weights.train_full().expect("weights");
        } else {
            weights.train_lora(&LoraConfig::default(), Seed::new(2)).expect("an adapter");
        }
        let lengths: Vec<usize> = (0..rows).map(|row| 18 + row % 10).collect();
        let batch = batch(647, &lengths, &mut Seed::new(3).generator()).expect("a batch");
        let mut defense = defense(method, json!({})).expect("a defense");
        let mut optimizer = AdamW::new(AdamWConfig::default());
        criterion.bench_function(name, |bencher| {
            bencher.iter(|| {
                let update = step(model.as_ref(), &weights, defense.as_mut(), &batch, 0).expect("an update");
                let factor = update.grads.clip_factor(1.).expect("gradients");
                optimizer.step(&weights, &update.grads, &factor, 1e-5).expect("a step");
            });
        });
    }
}

criterion_group!(benches, steps);
criterion_main!(benches);
