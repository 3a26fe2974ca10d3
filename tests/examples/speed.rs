use candle_core::{DType, Device};
use std::time::Instant;
use titer::plan::{OptimSpec, Steps};
use titer::train_loop::{Training, Watch};
use titer_core::data::{Example, Stream};
use titer_core::optim::Schedule;
use titer_core::rng::Seed;
use titer_core::step::Streams;
struct Quiet;
impl Watch for Quiet {
    fn started(&mut self, _: usize, _: usize) {}
    fn step(&mut self, _: usize, _: f64) {}
    fn answered(&mut self, _: usize) {}
    fn must_stop(&self) -> bool {
        false
    }
    fn checkpoint_due(&self) -> bool {
        false
    }
    fn save(&mut self, _: usize, _: &dyn Fn(&std::path::Path) -> titer_core::Result<()>) -> titer_core::Result<()> {
        Ok(())
    }
    fn resume(&self) -> Option<std::path::PathBuf> {
        None
    }
}
fn run(kind: &str) {
    let config = serde_json::json!({"model_type":"llama","vocab_size":647,"hidden_size":64,"intermediate_size":176,"num_hidden_layers":3,"num_attention_heads":4,"max_position_embeddings":128});
    let model = titer_tests::build(&config).unwrap();
    let mut weights = titer_core::Weights::random(model.as_ref(), Seed::new(1), DType::F32, &Device::Cpu).unwrap();
    let (bs, first, name) = match kind {
        "pretrain" => (16, 1, "sft"),
        "sft" => (8, 12, "sft"),
        _ => (8, 12, "vaccine"),
    };
    if kind == "pretrain" {
        weights.train_full().unwrap()
    } else {
        weights.train_lora(&Default::default(), Seed::new(2)).unwrap()
    }
    let examples: Vec<Example> = (0..800)
        .map(|i| Example {
            tokens: (0..(14 + i % 22)).map(|j| ((i * 31 + j * 17) % 647) as u32).collect(),
            first_label: first,
        })
        .collect();
    let optim = OptimSpec {
        steps: Steps::Steps(300),
        batch_size: bs,
        accumulate: 1,
        bucket: if kind == "pretrain" { 8 } else { 1 },
        learning_rate: 1e-3,
        schedule: Schedule::Cosine,
        warmup: 0.1,
        weight_decay: 0.1,
        betas: [0.9, 0.98],
        eps: 1e-8,
        clip: Some(1.),
    };
    let data = Stream::new(examples.into(), bs, optim.bucket, Seed::new(1), 0).unwrap();
    let mut d = titer_tests::defense(name, serde_json::json!({})).unwrap();
    let t = Instant::now();
    let training = Training {
        model: model.as_ref(),
        weights: &mut weights,
        defense: d.as_mut(),
        data,
        streams: Streams::default(),
        optim: &optim,
        seed: Seed::new(1),
        monitor: vec![],
    };
    training.run(&mut Quiet).unwrap();
    println!("{kind}: {:.2} ms/step", t.elapsed().as_secs_f64() * 1000. / 300.);
}
fn main() {
    let threads: usize = std::env::args().nth(1).and_then(|a| a.parse().ok()).unwrap_or(1);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
        for k in ["pretrain", "sft", "vaccine"] {
            run(k)
        }
    });
}
