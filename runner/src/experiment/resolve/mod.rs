//! From what the user wrote to what it means: names looked up, defaults filled in, data files hashed.
//!
//! Every mistake is collected with its key, so that one run of `titer plan` shows them all. What comes out holds no
//! mistake that can be known without a device.

mod attack;
mod base;
mod checks;
mod data;
mod evaluate;
mod methods;
mod training;

use std::path::{Component, Path};

use titer_core::device::DeviceChoice;
use titer_core::report::Input;
use titer_core::weights::LoraConfig;
use titer_core::{Kind, Precision, arithmetic, bounds};

use super::axes::AXES;
use super::config::{AlignAdapter, Config, FineTuneMode, LoadedConfig};
use super::spec::{AdapterSpec, EncodingSpec, Runtime, absolute};
use super::{Align, Experiment};
use crate::diagnostics::Problems;
use crate::{names, plugins};
use checks::Resolver;
use data::Use;

/// Looks everything up.
///
/// # Errors
/// Every mistake that can be known without a device.
pub fn resolve(loaded: &LoadedConfig) -> Result<Experiment, Problems> {
    let config = &loaded.config;
    let mut cx = Resolver::new(&loaded.source);

    if !cx.cells(config) {
        return Err(cx.problems);
    }
    cx.take("experiment", names::check(&config.experiment));
    cx.check(
        is_file_name(&config.experiment),
        "experiment",
        &format!("`{}` is not the name of one folder", config.experiment.escape_debug()),
        "use a plain name without `/` and `\\`, and place the results with --out DIR",
    );
    cx.seeds("seeds", &config.seeds);
    cx.take("", config.lora.check());
    let precision = cx.take("", Precision::parse(&config.dtype));
    cx.positive("encoding.max_length", config.encoding.max_length, bounds::TOKENS);
    let (bases, model) = cx.base(&config.base, &config.dtype).unzip();
    if let Some(model) = &model {
        cx.lora_targets("lora", &config.lora, model.as_ref());
        cx.take("", precision.map_or(Ok(()), |precision| precision.check(model.params())));
    }
    let template = cx.template(&config.encoding, bases.as_deref().unwrap_or_default());
    let encoding = EncodingSpec { template, max_length: config.encoding.max_length };
    let full = config.align.as_ref().is_some_and(|align| align.adapter == AlignAdapter::Full);
    if full || config.fine_tune.mode == FineTuneMode::Full {
        cx.take("", precision.map_or(Ok(()), Precision::check_trainable));
    }
    // A plan says in full what is trained, also where the configuration leaves it to the model.
    let spelled_out = |lora: &LoraConfig| model.as_ref().map_or_else(|| lora.clone(), |m| lora.for_params(m.params()));
    let lora = spelled_out(&config.lora);
    let user_lora = cx.user_lora(&config.fine_tune, model.as_deref()).map_or_else(|| lora.clone(), spelled_out);

    let streams = config.streams.iter().map(|(name, stream)| (name.as_str(), cx.stream(name, stream))).collect();
    let methods = cx.methods(config, &streams, model.as_deref());

    let aligns = methods.iter().any(|method| method.align.is_some());
    let align = config.align.as_ref().and_then(|align| {
        cx.check(!align.data.is_empty(), "align.data", "the list is empty", "name the alignment data");
        let data: Vec<_> = align
            .data
            .iter()
            .enumerate()
            .filter_map(|(index, rows)| cx.rows(&format!("align.data.{index}"), rows, Use::Train))
            .map(|drawn| drawn.spec)
            .collect();
        let adapter = match align.adapter {
            AlignAdapter::Lora => AdapterSpec::Fresh(lora.clone()),
            AlignAdapter::Full => AdapterSpec::Full,
        };
        Some(Align { data, adapter, optim: cx.optim("align.train", &align.train)? })
    });
    if aligns && config.align.is_none() {
        cx.problem(
            "methods",
            "a method aligns, but there is no alignment stage",
            "add [align] with data and train, or set align = \"none\"",
        );
    }
    let fine_tune = cx.fine_tune(&config.fine_tune, &user_lora, config.evaluate.task_prompts);
    let (probes, judges) = cx.evaluate(&config.evaluate);
    cx.published(config);

    let arithmetic = cx.arithmetic(config);
    let runtime = Runtime {
        folder: absolute(loaded.source.folder()),
        device: config.device.clone(),
        arithmetic: config.arithmetic,
        checkpoint_seconds: config.checkpoint_seconds,
        plugins: plugins::files(),
    };
    let inputs = cx.hashes.iter().map(|(path, hash)| Input { path: path.display().to_string(), blake3: hash.clone() });
    let inputs = inputs.collect();
    let hub_data = cx.hub_data.values().map(|(files, _)| files.clone()).collect();
    match (bases, fine_tune) {
        (Some(bases), Some(fine_tune)) => cx.problems.into_result(Experiment {
            name: config.experiment.clone(),
            seeds: config.seeds.clone(),
            bases,
            model: config.base.model.clone(),
            encoding,
            align,
            fine_tune,
            methods,
            probes,
            judges,
            batch_size: config.evaluate.batch_size,
            arithmetic,
            runtime,
            inputs,
            hub_data,
        }),
        // A missing part has left its reason behind.
        _ => Err(cx.problems),
    }
}

impl Resolver<'_> {
    /// The product of everything that is swept over.
    fn cells(&mut self, config: &Config) -> bool {
        let axes: Vec<(&str, usize)> = AXES.iter().map(|axis| (axis.key, (axis.listed)(config))).collect();
        let cells = axes.iter().fold(1usize, |cells, (_, length)| cells.saturating_mul(*length));
        let longest = axes.iter().max_by_key(|(_, length)| *length).map_or("methods", |(key, _)| key);
        let message = format!("the experiment has {cells} cells, at most {} are possible", bounds::CELLS);
        self.check(cells <= bounds::CELLS, longest, &message, "shorten this list, or split the experiment");
        cells <= bounds::CELLS
    }

    /// What decides the rounding. A device that cannot be used here has keys of its own: its numbers are not ours.
    fn arithmetic(&mut self, config: &Config) -> String {
        match DeviceChoice::of(&config.device) {
            Ok(device) => arithmetic::identity(config.arithmetic, device),
            Err(error) if error.kind() == Kind::Device => format!("{} (not opened)", config.device),
            Err(error) => {
                self.take::<()>("", Err(error));
                String::new()
            }
        }
    }
}

/// Whether files and folders can have this name, anywhere, without meaning another place.
fn is_file_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    let alone = matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name);
    alone && !name.contains(['\\', '\0'])
}

#[cfg(test)]
mod tests {
    use super::AdapterSpec;
    use crate::testing::{load, problems};

    #[test]
    fn the_sample_resolves() {
        let experiment = super::resolve(&load(&[], &[]).unwrap()).unwrap_or_else(|problems| panic!("{problems}"));
        assert_eq!(experiment.methods[1].align.as_ref().unwrap().spec.settings["rho"], 2.0);
        assert_eq!(experiment.fine_tune.harmful.unwrap().rows, 4);
    }

    #[test]
    fn the_user_may_train_another_shape_than_the_alignment() {
        let loaded = load(&[("samples = 40", "samples = 40\nlora = { r = 3 }")], &[]).unwrap();
        let experiment = super::resolve(&loaded).unwrap_or_else(|problems| panic!("{problems}"));
        let rank = |adapter: &AdapterSpec| match adapter {
            AdapterSpec::Fresh(lora) => lora.r,
            other => panic!("{other:?}"),
        };
        assert_eq!(rank(&experiment.fine_tune.adapter), 3);
        assert_eq!(rank(&experiment.align.unwrap().adapter), 8);
    }

    #[test]
    fn each_mistake_is_told() {
        let train = "train = { epochs = 2, batch_size = 4, learning_rate = 1e-3 }";
        for (from, to, expected) in [
            ("\"demo\"", "\"../demo\"", "key: experiment"),
            ("\"demo\"", "\"/tmp/demo\"", "is not the name of one folder"),
            ("\"demo\"", "\"a/b\"", "is not the name of one folder"),
            ("\"demo\"", "\"demo/\"", "is not the name of one folder"),
            ("\"demo\"", "\"..\"", "is not the name of one folder"),
            ("\"demo\"", "'a\\b'", "is not the name of one folder"),
            ("seeds = [0, 1]\n\n[lora]", "seeds = []\n\n[lora]", "the list is empty: nothing would run"),
            ("seeds = [0, 1]\n\n[lora]", "seeds = [1, 1]\n\n[lora]", "`1` appears twice"),
            ("harmful_ratios = [0.0, 0.1]", "harmful_ratios = [0.0, 1.1]", "must lie in [0, 1], found `1.1`"),
            ("samples = 40", "samples = 3", "`0.1` of 3 rows would be 0 rows, which is 0.000 of them"),
            ("\"q_proj\"", "\"q_prj\"", "no linear layer `q_prj`; did you mean `q_proj`?"),
            ("\"fake-model\"", "\"fake-modl\"", "unknown model `fake-modl`; did you mean `fake-model`?"),
            ("\"fake-judge\"", "\"fake-juge\"", "unknown judge `fake-juge`; did you mean `fake-judge`?"),
            ("task = \"fake-rows\", rows = 50", "task = \"fake-row\", rows = 50", "key: align.data.0.task"),
            ("\"fake-shield\"", "\"fake-shild\"", "unknown defense `fake-shild`; did you mean `fake-shield`?"),
            ("rho = 2.0", "roh = 2.0", "key: methods.1.align.roh"),
            ("rho = 2.0", "rho = -2.0", "`rho` must be at least 0"),
            ("rho = 2.0", "rho = \"a\"", "key: methods.1.align.rho"),
            ("fine_tune = \"fake-plain\"", "fine_tune = \"fake-shield\"", "does not act at the stage `fine_tune`"),
            ("fine_tune = \"fake-plain\"", "fine_tune = \"fake-elsewhere\"", "acts on the sites `expert_out`"),
            ("[streams]\nharmful", "[streams]\nother", "draws from the stream `harmful`, which is not configured"),
            ("name = \"Shield\"", "name = \"none\"", "`none` appears twice"),
            (train, &train.replace("epochs", "steps = 3, epochs"), "either `steps` or `epochs`; both are given"),
            (train, &train.replace("epochs = 2, ", ""), "either `steps` or `epochs`; neither is given"),
            (train, &train.replace("size = 4", "size = 0"), "expected at least 1, found `0`"),
            (train, &train.replace("1e-3", "1e-3, warmup = 2"), "key: align.train.warmup"),
            (train, &train.replace("1e-3", "1e-3, checkpointing = true"), "gradient checkpointing: it looks inside"),
            (
                "align = \"none\"\n",
                "",
                "lacks the key `align`: `align = \"sft\"` for plain alignment, `align = \"none\"` for none",
            ),
            ("rows = 100", "word = \"x\"", "the number of rows is missing"),
            ("word = \"hello\"", "wrd = \"hello\"", "unknown setting `wrd`; did you mean `word`?"),
            ("word = \"hello\"", "file = \"no.csv\"", "cannot read"),
            ("judges = [\"fake-judge\"]", "", "need a judge"),
            ("samples = 40", "samples = 40\nlora = { r = 0 }", "key: fine_tune.lora.r"),
            ("samples = 40", "samples = 40\nlora = { target_modules = [\"q_prj\"] }", "did you mean `q_proj`?"),
            ("samples = 40", "samples = 40\nmode = \"single\"\nlora = {}", "no adapter of the user's own"),
        ] {
            let text = problems(&[(from, to)]);
            assert!(text.contains(expected), "`{to}` should give `{expected}`, gave\n{text}");
            assert!(text.contains("help: "), "no remedy in\n{text}");
        }
    }

    #[test]
    fn what_accumulation_makes_of_a_defense_is_noted() {
        let notes = |changes: &[(&str, &str)]| {
            let experiment =
                super::resolve(&load(changes, &[]).unwrap()).unwrap_or_else(|problems| panic!("{problems}"));
            experiment.methods.into_iter().map(|method| method.notes).collect::<Vec<_>>()
        };
        assert!(notes(&[]).concat().is_empty());
        let noted = notes(&[("epochs = 2, batch_size = 4", "epochs = 2, accumulate = 3, batch_size = 4")]);
        let expected = "`fake-shield` with 3 accumulated batches of 4 rows is not one batch of 12: it sees batches";
        assert_eq!(noted, [vec![], vec![expected.to_owned()]]);
    }

    #[test]
    fn a_missing_file_says_where_its_path_starts() {
        let told = |changes: &[(&str, &str)], sets: &[&str]| {
            let loaded = load(changes, sets).unwrap();
            let folder = super::absolute(loaded.source.folder()).display().to_string();
            (super::resolve(&loaded).unwrap_err().to_string(), folder)
        };
        let (text, folder) = told(&[("word = \"hello\"", "file = \"no.csv\"")], &[]);
        assert!(text.contains(&format!("`no.csv` starts at {folder}, the configuration's folder")), "{text}");
        assert_eq!(text.matches("cause: ").count(), 1, "{text}");
        let here = std::env::current_dir().unwrap().display().to_string();
        let (text, _) = told(&[], &["fine_tune.tasks.0.file=no.csv"]);
        let start = format!("`no.csv` starts at {here}, the working directory, since it is from --set fine_tune");
        assert!(text.contains(&start), "{text}");
        let (text, _) = told(&[], &["fine_tune.tasks.0.file=/no.csv"]);
        assert!(text.contains("help: check the path\n"), "{text}");
        let (text, _) = told(&[], &["base.path=no-model"]);
        assert!(text.contains(&format!("`no-model` starts at {here}, the working directory")), "{text}");
    }

    #[test]
    fn published_values_are_checked() {
        let judges = "judges = [\"fake-judge\"]\n";
        let row = "[[published]]\nsource = \"a table\"\nmethod = \"Shield\"\ntask = \"chat\"\nsamples = 40\n\
                   harmful_ratios = [0.1]\nharmful_score = [50.0]\nn_prompts = { harmful = 5, task = 5 }\njudge = \"x\"\n";
        for (from, to, expected) in [
            ("\"Shield\"", "\"Sheild\"", "`Sheild` is not in this configuration; did you mean `Shield`?"),
            ("\"chat\"", "\"chatter\"", "key: published.0.task"),
            ("samples = 40", "samples = 40\nlora = \"duble\"", "did you mean `double`?"),
            ("[50.0]", "[50.0, 51.0]", "2 values for 1 harmful ratios"),
            ("[50.0]", "[150.0]", "must lie in [0, 100], found `150`"),
            ("task = 5", "task = 0", "key: published.0.n_prompts"),
            ("source", "sauce", "did you mean `source`?"),
        ] {
            let text = problems(&[(judges, &format!("{judges}\n{}", row.replacen(from, to, 1)))]);
            assert!(text.contains(expected), "`{to}` should give `{expected}`, gave\n{text}");
            assert!(text.contains("help: "), "no remedy in\n{text}");
        }
    }

    #[test]
    fn missing_data_and_a_wrong_key_have_their_own_exit_codes() {
        let missing = super::resolve(&load(&[("word = \"hello\"", "file = \"no.csv\"")], &[]).unwrap()).unwrap_err();
        assert_eq!(missing.exit_code(), std::process::ExitCode::from(3));
        let wrong = super::resolve(&load(&[("rho = 2.0", "roh = 2.0")], &[]).unwrap()).unwrap_err();
        assert_eq!(wrong.exit_code(), std::process::ExitCode::from(2));
    }

    #[test]
    fn all_mistakes_come_at_once() {
        let text = problems(&[("rho = 2.0", "roh = 2.0"), ("\"q_proj\"", "\"q_prj\""), ("[0.0, 0.1]", "[0.0, 3.0]")]);
        assert!(text.contains("\n3 errors\n"), "{text}");
    }
}
