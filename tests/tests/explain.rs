//! `titer explain`: terms, keys of the configuration and plugins, however they are written.

use titer_tests::cli::{stderr, titer};

fn explained(name: &str) -> String {
    let output = titer().args(["explain", name]).output().expect("titer runs");
    assert!(output.status.success(), "{name}: {}", stderr(&output));
    String::from_utf8(output.stdout).expect("text")
}

fn holds(name: &str, parts: &[&str]) {
    let text = explained(name);
    for part in parts {
        assert!(text.contains(part), "`titer explain {name}` lacks {part:?}:\n{text}");
    }
}

#[test]
fn terms_are_found_by_any_name_and_in_any_case() {
    let text = explained("hs");
    assert!(text.starts_with("Harmful score (term)"), "{text}");
    for name in ["HS", "harmful_score", "harmful score", "Harmful-Score"] {
        assert_eq!(explained(name), text);
    }
    holds("protocol", &["prompts, template, decoding, judge, scoring"]);
    holds("†", &["fewer than half"]);
}

#[test]
fn keys_are_explained_with_type_default_and_what_they_change() {
    holds(
        "fine_tune.samples",
        &["whole number", "it must be given", "fine-tuning and every stage after it", "coordinates"],
    );
    holds("lora.r", &["default   8", "setting"]);
    holds("evaluate.batch_size", &["default   32", "no stage", "nothing"]);
    holds("methods.0.align.rho", &["vaccine.rho = 2.0", "coordinates"]);
    holds("streams.safe.rows", &["streams.NAME.rows"]);
    holds("lora", &["lora.alpha"]);
}

#[test]
fn a_last_part_alone_lists_all_that_end_in_it() {
    holds("learning_rate", &["align.train.learning_rate", "fine_tune.train.learning_rate"]);
    holds("rho", &["vaccine.rho = 2.0", "booster.rho"]);
    // Only one key ends in it, so it is explained in full.
    holds("task_prompts", &["evaluate.task_prompts (key of the configuration)", "default   200"]);
}

#[test]
fn plugins_keep_their_explanations_and_a_name_with_several_meanings_shows_all() {
    holds("Vaccine", &["vaccine (defense, version", "rho = 2.0"]);
    holds("vaccine.rho", &["setting of the defense vaccine", "number"]);
    holds("align", &["Alignment (term)", "align (key of the configuration)", "titer explain key:align"]);
    let only = explained("key:align");
    assert!(!only.contains("(term)") && !only.contains("several things"), "{only}");
}

#[test]
fn an_unknown_name_is_answered_with_the_nearest() {
    for (name, near) in
        [("vacine", "`vaccine`"), ("fine_tune.sampels", "`fine_tune.samples`"), ("harmfull score", "armful")]
    {
        let output = titer().args(["explain", name]).output().expect("titer runs");
        assert_eq!(output.status.code(), Some(2));
        assert!(stderr(&output).contains(near), "{}", stderr(&output));
    }
}
