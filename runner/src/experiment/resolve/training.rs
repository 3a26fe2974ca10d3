//! How a stage trains.

use titer_core::bounds;

use super::checks::Resolver;
use crate::experiment::config::TrainConfig;
use crate::experiment::exclusive::LENGTH;
use crate::experiment::spec::{OptimSpec, Steps};

impl Resolver<'_> {
    pub(super) fn optim(&mut self, key: &str, train: &TrainConfig) -> Option<OptimSpec> {
        let at = |name: &str| format!("{key}.{name}");
        for (name, count) in
            [("batch_size", train.batch_size), ("accumulate", train.accumulate), ("bucket", train.bucket)]
        {
            self.positive(&at(name), count, bounds::BATCH);
        }
        self.fraction(&at("warmup"), train.warmup, "0.1 means that the rate rises over the first tenth of the steps");
        self.learning_rate(&at("learning_rate"), train.learning_rate);
        for (name, number) in [("weight_decay", train.weight_decay), ("eps", train.eps), ("clip", train.clip)] {
            let message = format!("must be a finite number, at least 0, found `{number}`");
            self.check(number >= 0. && number.is_finite(), &at(name), &message, "0 switches it off");
        }
        for (index, beta) in train.betas.iter().enumerate() {
            let message = format!("must lie in [0, 1), found `{beta}`");
            self.check((0. ..1.).contains(beta), &at(&format!("betas.{index}")), &message, "usual are [0.9, 0.999]");
        }
        let steps = match (train.steps, train.epochs) {
            (Some(steps), None) => ("steps", steps, Steps::Steps(steps)),
            (None, Some(epochs)) => ("epochs", epochs, Steps::Epochs(epochs)),
            (steps, _) => {
                self.not_one(key, &LENGTH, steps.is_some());
                return None;
            }
        };
        self.positive(&at(steps.0), steps.1, bounds::STEPS);
        Some(OptimSpec {
            steps: steps.2,
            batch_size: train.batch_size,
            accumulate: train.accumulate,
            checkpointing: train.checkpointing,
            bucket: train.bucket,
            learning_rate: train.learning_rate,
            schedule: train.schedule,
            warmup: train.warmup,
            weight_decay: train.weight_decay,
            betas: train.betas,
            eps: train.eps,
            clip: Some(train.clip).filter(|clip| *clip > 0.),
        })
    }

    pub(super) fn learning_rate(&mut self, key: &str, rate: f64) {
        let message = format!("must be a positive number, found `{rate}`");
        self.check(rate > 0. && rate.is_finite(), key, &message, "1e-3 is usual for LoRA, 1e-5 for all parameters");
    }
}
