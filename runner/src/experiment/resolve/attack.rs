//! The user's fine-tuning, which is the attack.

use titer_core::Model;
use titer_core::bounds;
use titer_core::data::harmful_count;
use titer_core::weights::LoraConfig;

use super::checks::Resolver;
use super::data::Use;
use crate::experiment::config::{FineTuneConfig, FineTuneMode, UserTaskConfig};
use crate::experiment::spec::{AdapterSpec, RowsSpec, of_rows};
use crate::experiment::{FineTune, Probe, UserRows};
use crate::names;

/// How far the share of harmful rows may be from the ratio that tables and plots name.
const ROUNDED_RATIO: f64 = 0.005;

impl Resolver<'_> {
    pub(super) fn fine_tune(&mut self, config: &FineTuneConfig, lora: &LoraConfig, prompts: usize) -> Option<FineTune> {
        let samples = config.samples.as_slice();
        self.check(!samples.is_empty(), "fine_tune.samples", "the list is empty", "give at least one number of rows");
        for &samples in samples {
            self.positive("fine_tune.samples", samples, bounds::ROWS);
        }
        self.distinct("fine_tune.samples", samples.iter().map(usize::to_string));
        let ratios = &config.harmful_ratios;
        self.check(!ratios.is_empty(), "fine_tune.harmful_ratios", "the list is empty", "0 is the clean run");
        for (index, &ratio) in ratios.iter().enumerate() {
            let key = format!("fine_tune.harmful_ratios.{index}");
            self.fraction(&key, ratio, "0.1 means that one row in ten is harmful");
        }
        self.distinct("fine_tune.harmful_ratios", ratios.iter().map(f64::to_string));
        for (index, &ratio) in ratios.iter().enumerate() {
            for &samples in samples {
                let Ok(count) = harmful_count(samples, ratio) else { continue };
                let share = count as f64 / samples.max(1) as f64;
                self.check(
                    (share - ratio).abs() <= ROUNDED_RATIO,
                    &format!("fine_tune.harmful_ratios.{index}"),
                    &format!("`{ratio}` of {samples} rows would be {count} rows, which is {share:.3} of them"),
                    "choose `samples` so that each ratio of them is a whole number of rows",
                );
            }
        }
        self.distinct("fine_tune.learning_rates", config.learning_rates.iter().map(f64::to_string));
        for (index, &rate) in config.learning_rates.iter().enumerate() {
            self.learning_rate(&format!("fine_tune.learning_rates.{index}"), rate);
        }
        self.check(!config.tasks.is_empty(), "fine_tune.tasks", "the list is empty", "name at least one task");
        let askable = self.positive("evaluate.task_prompts", prompts, bounds::ROWS);
        let tasks = config.tasks.iter().enumerate().filter(|_| askable);
        let tasks: Vec<_> = tasks.filter_map(|(index, task)| self.user_task(index, task, prompts)).collect();
        self.distinct("fine_tune.tasks", tasks.iter().map(|task| task.name.clone()));
        let harmful = self.harmful_rows(config);
        let monitor = config.monitor.as_ref().and_then(|rows| self.rows("fine_tune.monitor", rows, Use::Test));
        let adapter = match config.mode {
            FineTuneMode::Double => AdapterSpec::Fresh(lora.clone()),
            FineTuneMode::Single => AdapterSpec::Continue(lora.clone()),
            FineTuneMode::Full => AdapterSpec::Full,
        };
        let optim = self.optim("fine_tune.train", &config.train)?;
        let rates =
            if config.learning_rates.is_empty() { vec![optim.learning_rate] } else { config.learning_rates.clone() };
        Some(FineTune {
            tasks,
            samples: samples.to_vec(),
            harmful,
            ratios: ratios.clone(),
            learning_rates: rates,
            mode: config.mode,
            adapter,
            monitor: monitor.map(|drawn| drawn.spec),
            optim,
        })
    }

    /// The harmful rows that the largest mixture needs.
    pub(super) fn harmful_rows(&mut self, config: &FineTuneConfig) -> Option<RowsSpec> {
        let most = config.samples.as_slice().iter().copied().max().unwrap_or(0).min(bounds::ROWS);
        let ratio = config.harmful_ratios.iter().copied().fold(0., f64::max);
        let needed = harmful_count(most, ratio.min(1.)).unwrap_or(0);
        let Some(source) = &config.harmful else {
            self.check(
                needed == 0,
                "fine_tune.harmful_ratios",
                "a ratio above 0 needs harmful rows, and `fine_tune.harmful` is missing",
                "add `harmful = { task = \"…\" }` under [fine_tune]",
            );
            return None;
        };
        let (task, built) = self.task("fine_tune.harmful", &source.task, &source.settings)?;
        self.drawn("fine_tune.harmful", built.as_ref(), needed, Use::Train)?;
        let available = source.rows.unwrap_or(needed);
        let message = format!("{needed} harmful rows are needed (samples × ratio), `rows` allows {available}");
        self.check(available >= needed, "fine_tune.harmful.rows", &message, "leave `rows` out, or raise it");
        Some(RowsSpec { task, rows: needed })
    }

    pub(super) fn user_task(&mut self, index: usize, user: &UserTaskConfig, prompts: usize) -> Option<UserRows> {
        let key = format!("fine_tune.tasks.{index}");
        self.take(&format!("{key}.name"), names::check(table_name(user)));
        let (task, built) = self.task(&key, &user.task, &user.settings)?;
        let max_new_tokens = user.max_new_tokens.unwrap_or_else(|| built.max_new_tokens());
        self.positive(&format!("{key}.max_new_tokens"), max_new_tokens, bounds::TOKENS);
        let asked = self.drawn(&key, built.as_ref(), prompts, Use::Test)?;
        let scored = asked.first().is_none_or(|row| built.score(row, &row.output).is_some());
        let message = format!("`{}` does not score answers, so there would be no fine-tune accuracy", user.task);
        self.check(scored, &format!("{key}.scoring"), &message, "give it a scoring rule, or take another task");
        let prompts = RowsSpec { task, rows: prompts };
        let probe = Probe { name: "task", prompts, prompts_content: of_rows(&asked), max_new_tokens };
        let labels = self.take(&key, built.labels())?;
        Some(UserRows { name: table_name(user).to_owned(), probe, labels })
    }

    /// The shape of the user's adapter where the configuration gives it one of its own.
    pub(super) fn user_lora<'c>(
        &mut self,
        config: &'c FineTuneConfig,
        model: Option<&dyn Model>,
    ) -> Option<&'c LoraConfig> {
        let lora = config.lora.as_ref()?;
        self.take("fine_tune", lora.check());
        self.check(
            config.mode == FineTuneMode::Double,
            "fine_tune.lora",
            &format!("mode `{}` has no adapter of the user's own", config.mode.name()),
            "remove it, or set fine_tune.mode = \"double\"",
        );
        if let Some(model) = model {
            self.lora_targets("fine_tune.lora", lora, model);
        }
        Some(lora)
    }
}

/// The name of a user's task in the table.
pub(super) fn table_name(user: &UserTaskConfig) -> &str {
    user.name.as_deref().unwrap_or(&user.task)
}
