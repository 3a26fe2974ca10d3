//! The stage after fine-tuning in the runner: what it serves, and what it asks for.

use anyhow::Result;
use titer_tests::cli::{answers, run, small, stderr, titer};

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
