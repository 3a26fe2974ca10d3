use std::path::Path;

use super::*;
use crate::testing::{CONFIG, load, problems};

fn read(path: &str, text: &str, environment: &[(&str, &str)], sets: &[&str]) -> Result<LoadedConfig, Problems> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(path);
    std::fs::write(&path, text).unwrap();
    let environment = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    let sets: Vec<String> = sets.iter().map(|&set| set.to_owned()).collect();
    Config::from_source(Source::read(&path, environment, &sets)?)
}

#[test]
fn later_layers_win() {
    let defaults = load(&[], &[]).unwrap().config;
    assert_eq!((defaults.device.as_str(), defaults.encoding.max_length), ("auto", 256));
    let environment = [("TITER_DEVICE", "cpu"), ("TITER_ENCODING__MAX_LENGTH", "64"), ("TITER_CACHE_DIR", "/nowhere")];
    let text = format!("device = \"cuda\"\n{CONFIG}");
    let config = read("a.toml", &text, &environment, &["encoding.max_length=32"]).unwrap().config;
    assert_eq!((config.device.as_str(), config.encoding.max_length), ("cpu", 32));
}

#[test]
fn assignments_reach_into_lists_and_hold_any_value() {
    let sets = ["methods.1.align.rho=5", "fine_tune.harmful_ratios=[0.2, 0.3]", "experiment=night shift"];
    let config = load(&[], &sets).unwrap().config;
    assert_eq!(config.fine_tune.harmful_ratios, [0.2, 0.3]);
    assert_eq!(config.experiment, "night shift");
    let DefenseRef::Table { settings, .. } = &config.methods[1].align else { panic!("a table") };
    assert_eq!(settings["rho"], 5);
}

#[test]
fn a_configuration_survives_toml_and_yaml() {
    let config = load(&[], &[]).unwrap().config;
    let toml = toml::to_string(&config).unwrap();
    assert_eq!(read("b.toml", &toml, &[], &[]).unwrap().config, config);
    let yaml = serde_norway::to_string(&config).unwrap();
    assert_eq!(read("b.yaml", &yaml, &[], &[]).unwrap().config, config);
}

#[test]
fn every_mistake_is_shown_with_its_line_and_a_remedy() {
    let text = problems(&[
        ("seeds = [0, 1]\n\n[lora]", "seeds = [0, \"1\"]\n\n[lora]"),
        ("task_prompts", "task_promps"),
        ("samples = 40", "samples = \"40\""),
    ]);
    for expected in [
        "expected a whole number, at least 0, found the string `1`",
        "unknown key `task_promps`; did you mean `task_prompts`?",
        "demo.toml:22",
        "22 | samples = \"40\"",
        "key: fine_tune.samples",
        "help: write 40 without quotes",
        "3 errors",
    ] {
        assert!(text.contains(expected), "no `{expected}` in\n{text}");
    }
}

#[test]
fn a_mistake_from_outside_the_file_names_its_origin() {
    let text = load(&[], &["fine_tune.mode=duble"]).unwrap_err().to_string();
    assert!(text.contains("did you mean `double`?") && text.contains("from: --set fine_tune.mode=duble"), "{text}");
    let text = read("a.toml", CONFIG, &[("TITER_SEEDS", "none")], &[]).unwrap_err().to_string();
    assert!(text.contains("from: environment variable TITER_SEEDS"), "{text}");
    assert!(load(&[], &["fine_tune"]).unwrap_err().to_string().contains("is not an assignment"));
}

#[test]
fn the_later_layer_wins_where_one_of_two_keys_is_given() {
    let length = |environment: &[(&str, &str)], overrides: &[&str]| {
        let train = read("a.toml", CONFIG, environment, overrides).unwrap().config.align.unwrap().train;
        (train.steps, train.epochs)
    };
    let steps = ("TITER_ALIGN__TRAIN__STEPS", "7");
    assert_eq!(length(&[], &[]), (None, Some(2)));
    assert_eq!(length(&[], &["align.train.steps=100"]), (Some(100), None));
    assert_eq!(length(&[], &["align.train={steps=100}"]), (Some(100), None));
    assert_eq!(length(&[steps], &[]), (Some(7), None));
    assert_eq!(length(&[steps], &["align.train.epochs=3"]), (None, Some(3)));
    // Who says both in one breath is told so by the resolver.
    assert_eq!(length(&[], &["align.train.epochs=3", "align.train.steps=4"]), (Some(4), Some(3)));

    let base = |text: &str, set: &str| read("a.toml", text, &[], &[set]).unwrap().config.base;
    let shaped = CONFIG.replace("[base.pretrain]", "[base.shape]\nvocab_size = 9\n[base.pretrain]");
    let given = base(&shaped, "base.path=\"elsewhere\"");
    assert!(given.path.is_some() && given.pretrain.is_none() && given.shape.is_empty(), "{given:?}");
    let start = CONFIG.find("[base.pretrain]").unwrap();
    let end = CONFIG.find("[align]").unwrap();
    let loaded = format!("{}{}", &CONFIG[..start], &CONFIG[end..]).replace("[base]", "[base]\npath = \"there\"");
    let table = CONFIG[start..end].replace("[base.pretrain]", "").trim().replace('\n', ", ");
    let made = base(&loaded, &format!("base.pretrain={{ {table} }}"));
    assert!(made.path.is_none() && made.pretrain.is_some(), "{made:?}");
}

#[test]
fn an_assignment_that_leads_nowhere_says_where_it_stops() {
    for (set, message) in [
        ("methods.9.name=x", "the list `methods` has no entry `9`: it has 2, counted from 0"),
        ("methods.name=x", "the list `methods` has no entry `name`: it has 2, counted from 0"),
        ("methods.0.align.rho=5", "`methods.0.align` is `none`, which is no table and has no keys"),
        ("experiment.name=x", "`experiment` is `demo`, which is no table and has no keys"),
        ("align.train.learning_rate=nan", "expected a finite number, found `NaN`"),
    ] {
        let text = load(&[], &[set]).unwrap_err().to_string();
        assert!(text.contains(message) && text.contains(&format!("from: --set {set}")), "{text}");
    }
}

#[test]
fn malformed_files_name_the_line() {
    let text = read("a.toml", "experiment = \"x\"\nseeds = [", &[], &[]).unwrap_err().to_string();
    assert!(text.contains("not valid TOML") && text.contains("a.toml:2"), "{text}");
    let text = read("a.yaml", "experiment: x\nseeds: [\n", &[], &[]).unwrap_err().to_string();
    assert!(text.contains("not valid YAML") && text.contains("a.yaml:"), "{text}");
    assert!(read("a.json", "{}", &[], &[]).unwrap_err().to_string().contains("neither TOML nor YAML"));
    let missing = Config::load(Path::new("no/such.toml"), &[]).unwrap_err();
    assert!(missing.to_string().contains("no/such.toml"));
}

#[test]
fn yaml_keys_have_lines_too() {
    let yaml = serde_norway::to_string(&load(&[], &[]).unwrap().config).unwrap();
    let broken = yaml.replace("rho: 2.0", "rho: 2.0\n    extra: 1").replace("task_prompts: 5", "task_prompts: five");
    let line = broken.lines().position(|line| line.contains("task_prompts")).unwrap() + 1;
    let text = read("a.yaml", &broken, &[], &[]).unwrap_err().to_string();
    assert!(text.contains(&format!("a.yaml:{line}\n")), "{line} in\n{text}");
}

#[test]
fn the_schema_describes_every_key() {
    fn undocumented(schema: &Value, path: &str, missing: &mut Vec<String>) {
        for (name, property) in schema["properties"].as_object().into_iter().flatten() {
            if property.get("description").is_none() {
                missing.push(format!("{path}.{name}"));
            }
        }
    }
    let schema = Config::schema().to_value();
    let mut missing = Vec::new();
    undocumented(&schema, "", &mut missing);
    for (name, definition) in schema["$defs"].as_object().unwrap() {
        undocumented(definition, name, &mut missing);
    }
    assert_eq!(missing, Vec::<String>::new());
}
