//! The command line as a user meets it: output, errors and exit codes.

use std::path::Path;

use assert_cmd::Command;
use assert_cmd::assert::Assert;

fn titer(arguments: &[&str]) -> Assert {
    let mut command = Command::new(env!("CARGO_BIN_EXE_titer"));
    command.args(arguments).env_remove("TITER_CACHE_DIR").env_remove("TITER_LOG").assert()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn write(folder: &Path, name: &str, content: &str) -> String {
    let path = folder.join(name);
    std::fs::write(&path, content).expect("the folder can be written");
    path.display().to_string()
}

#[test]
fn the_schema_is_json() {
    let output = titer(&["schema"]).success().get_output().stdout.clone();
    let schema: serde_json::Value = serde_json::from_slice(&output).expect("JSON");
    assert_eq!(schema["title"], "Config");
}

#[test]
fn lists_are_json_on_request() {
    for kind in ["defenses", "models", "tasks", "judges"] {
        let output = titer(&["list", kind, "--json"]).success().get_output().stdout.clone();
        assert!(serde_json::from_slice::<serde_json::Value>(&output).expect("JSON").is_array());
    }
}

#[test]
fn the_doctor_sees_the_store() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let store = folder.path().join("store").display().to_string();
    let output = titer(&["doctor", "--store", &store]).success().get_output().stdout.clone();
    assert!(text(&output).contains("writable"));
    let file = write(folder.path(), "file", "");
    titer(&["doctor", "--store", &file]).code(3);
}

#[test]
fn a_wrong_configuration_is_code_2_and_shows_every_mistake() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let config = write(folder.path(), "a.toml", "experiment = 3\nseeds = true\n");
    let output = titer(&["plan", &config]).code(2).get_output().clone();
    let shown = text(&output.stderr);
    assert!(shown.contains("a.toml:1") && shown.contains("a.toml:2"), "{shown}");
    assert!(shown.contains("lacks the key `methods`"), "{shown}");
    assert!(output.stdout.is_empty());
}

#[test]
fn a_plugin_crate_is_made_under_a_name_that_is_free() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("noise").display().to_string();
    let made = titer(&["plugin", "new", "defense", "gradient-noise", "--path", &path]).success().get_output().clone();
    // The next step is one that this runner can do.
    let next = if cfg!(feature = "dynamic") { "next: titer plugin check" } else { "--features runner -- plugin check" };
    assert!(text(&made.stdout).contains(next), "{}", text(&made.stdout));
    let lib = std::fs::read_to_string(folder.path().join("noise/src/lib.rs")).expect("a crate");
    assert!(lib.contains("titer_core::plugin!();") && lib.contains("struct GradientNoise"));
    for name in ["vaccine", "Noise", "gradient-noise"] {
        let output = titer(&["plugin", "new", "defense", name, "--path", &path]).code(2).get_output().clone();
        assert!(text(&output.stderr).contains("help: "), "{}", text(&output.stderr));
    }
}

#[test]
fn a_plugin_that_the_runner_has_is_checked_by_its_name() {
    let output = titer(&["plugin", "check", "vaccine"]).success().get_output().clone();
    let shown = text(&output.stdout);
    assert!(shown.contains("vaccine on llama") && shown.contains("refuses an unknown setting"), "{shown}");
    assert!(!shown.contains("booster"), "{shown}");
    let output = titer(&["plugin", "check", "vacine"]).code(2).get_output().clone();
    assert!(text(&output.stderr).contains("did you mean `vaccine`?"), "{}", text(&output.stderr));
}

#[cfg(not(feature = "dynamic"))]
#[test]
fn a_runner_that_loads_nothing_says_how_to_build_one_that_does() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let plugin = write(folder.path(), "a.so", "");
    let config = write(folder.path(), "a.toml", "[plugins]\npaths = [\"a.so\"]\n");
    for arguments in [&["list", "--plugin", &plugin][..], &["plugin", "build", "."], &["plugin", "check", &plugin]] {
        let output = titer(arguments).code(2).get_output().clone();
        assert!(text(&output.stderr).contains("cargo build --release --features dynamic"), "{arguments:?}");
    }
    // The rest of the configuration is missing, and nothing is loaded for the sake of a wrong one.
    titer(&["plan", &config]).code(2);
}

#[test]
fn wrong_usage_is_code_2_and_a_missing_file_code_3() {
    titer(&["frobnicate"]).code(2);
    titer(&["run", "a.toml", "--jobs", "0"]).code(2);
    titer(&["plan", "no/such/file.toml"]).code(3);
    titer(&["report", "no/such/folder"]).code(3);
    titer(&["explain", "no-such-plugin"]).code(2);
    titer(&["generate", "--model", "x", "--prompt", "hi", "--device", "abacus"]).code(2);
}
