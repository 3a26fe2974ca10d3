//! A plugin crate from another workspace (`tests/stranger`), as a shared library and in a runner of its own.
//!
//! These tests need programs that `cargo test` does not build; `.ci/run` builds them and runs the tests with
//! `--ignored`.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use serde_json::Value;
use titer_tests::cli::{SMALL, results, stderr, titer};

/// The small experiment with three methods: one of Titer's own, the stranger's, and the stranger's in panic.
fn config(folder: &Path, head: &str) -> PathBuf {
    let (body, _) = SMALL.split_once("[[methods]]").expect("methods");
    let methods = "[[methods]]\nname = \"SFT\"\nalign = \"sft\"\n\n[[methods]]\nname = \"GC\"\n\
                   align = \"gradient-centralization\"\n\n[[methods]]\nname = \"Panic\"\n\
                   align = { defense = \"gradient-centralization\", panic_at = 3 }\n";
    let path = folder.join("stranger.toml");
    std::fs::write(&path, format!("{head}{body}{methods}")).expect("a file");
    path
}

/// `titer run` of the configuration by this runner.
fn run(mut runner: Command, folder: &Path, config: &Path) -> Output {
    let command = runner.arg("run").arg(config).arg("--store").arg(folder.join("store"));
    command.arg("--out").arg(folder.join("out")).output().expect("a run")
}

/// The plugin's panic takes its own cells and nothing else.
fn check_results(output: &Output, out: &Path) {
    assert_eq!(output.status.code(), Some(1), "{}", stderr(output));
    let results = results(out);
    let methods: Vec<&str> =
        results["rows"].as_array().expect("rows").iter().filter_map(|row| row["method"].as_str()).collect();
    assert_eq!(methods, ["SFT", "SFT", "GC", "GC"]);
    let failures = results["failures"].as_array().expect("failures");
    assert_eq!(failures.len(), 2, "{failures:?}");
    let told = failures.iter().any(|failure| failure.to_string().contains("the stranger panics as it was told"));
    assert!(told, "{failures:?}");
}

/// The shared library, built by the runner under test. Only its owner may write to the folder.
fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("stranger");
        let output = titer().args(["plugin", "build"]).arg(&folder).output().expect("a build");
        assert!(output.status.success(), "{}", stderr(&output));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        PathBuf::from(text.lines().next().expect("the path"))
    })
}

/// `titer list --plugin …`: its output, and whether the plugin's code has run.
fn list(plugin: &Path, pin: &str) -> (Output, bool) {
    let folder = tempfile::tempdir().expect("a folder");
    let mark = folder.path().join("mark");
    let mut argument = plugin.as_os_str().to_owned();
    argument.push(pin);
    let output = titer().args(["list", "--json", "--plugin"]).arg(argument).env("STRANGER_MARK", &mark).output();
    (output.expect("a process"), mark.exists())
}

#[test]
#[ignore = "needs the runner with the feature `dynamic`"]
fn a_shared_library_is_a_plugin_like_any_other() {
    let folder = tempfile::tempdir().expect("a folder");
    let hash = blake3_of(library());
    let head = format!("plugins = {{ paths = [{{ path = {:?}, blake3 = \"{hash}\" }}] }}\n", library());
    let config = config(folder.path(), &head);
    check_results(&run(titer(), folder.path(), &config), &folder.path().join("out"));

    let (output, ran) = list(library(), &format!("={hash}"));
    assert!(ran && output.status.success(), "{}", stderr(&output));
    let plugins: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let of = |name: &str| plugins.as_array().and_then(|all| all.iter().find(|plugin| plugin["name"] == name)).cloned();
    let (stranger, own) = (of("gradient-centralization").expect("the stranger"), of("vaccine").expect("our own"));
    assert_eq!((&stranger["from"]["plugin"], &stranger["from"]["blake3"]), (&"stranger 0.1.0".into(), &hash.into()));
    assert!(own["from"].is_null());
    let explained = titer().args(["explain", "gradient-centralization", "--plugin"]).arg(library()).output();
    assert!(String::from_utf8_lossy(&explained.expect("a process").stdout).contains("stranger 0.1.0"));

    // A changed file is another plugin: its stages run again, ours do not.
    let changed = folder.path().join("changed.so");
    let mut bytes = std::fs::read(library()).expect("the plugin");
    bytes.push(0);
    std::fs::write(&changed, bytes).expect("a file");
    let again = self::config(folder.path(), &format!("plugins = {{ paths = [{changed:?}] }}\n"));
    let plan = titer().arg("plan").arg(again).arg("--json").arg("--store").arg(folder.path().join("store")).output();
    let plan: Value = serde_json::from_slice(&plan.expect("a plan").stdout).expect("JSON");
    for stage in plan["stages"].as_array().expect("stages") {
        let label = stage["label"].as_str().expect("a label");
        let (ours, theirs) = (label.contains("SFT") || label.contains("pretrain"), label.contains("GC"));
        assert!(!ours || stage["cached"] == true, "{label} would run again");
        assert!(!theirs || stage["cached"] == false, "{label} would be taken from another plugin");
    }
}

#[test]
#[ignore = "needs the runner with the feature `dynamic`, and the stranger as a naive shared library"]
fn what_does_not_fit_is_refused_before_it_runs() {
    let folder = tempfile::tempdir().expect("a folder");
    let bytes = std::fs::read(library()).expect("the plugin");
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).expect("a file");
        path
    };
    let tampered = |name: &str, field: &str, from: char, to: char| {
        let field = format!(";{field}=");
        let at = bytes.windows(field.len()).position(|window| window == field.as_bytes()).expect("the field");
        let mut bytes = bytes.clone();
        let place = bytes[at + field.len()..].iter_mut().find(|byte| **byte != b' ').expect("a value");
        *place = if *place == from as u8 { to as u8 } else { from as u8 };
        write(name, &bytes)
    };
    let link = folder.path().join("link.so");
    symlink(library(), &link).expect("a link");
    let open = write("open.so", &bytes);
    std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o666)).expect("permissions");
    let target = assert_cmd::cargo::cargo_bin("titer").parent().expect("a folder").to_owned();
    let pin = format!("={}", "0".repeat(64));
    let cases: [(&str, PathBuf, &str, &[&str]); 12] = [
        ("another compiler", tampered("a.so", "rustc", '9', '8'), "", &["built otherwise", "rustc: the runner has"]),
        ("another core", tampered("b.so", "core-src", '0', '1'), "", &["built otherwise", "core-src: the runner has"]),
        ("another profile", tampered("c.so", "profile", 'R', 'S'), "", &["built otherwise", "profile: the runner has"]),
        (
            "other features",
            tampered("d.so", "features", 'c', 'd'),
            "",
            &["built otherwise", "features: the runner has"],
        ),
        ("a copy of the core", target.join("libstranger.so"), "", &["carries its own copy of the core", "expected"]),
        ("no plugin", target.join("libtiter_dylib.so"), "", &["no plugin record", "titer_core::plugin!();"]),
        ("text", write("text.so", b"plain text"), "", &["no shared library"]),
        ("half a file", write("half.so", &bytes[..bytes.len() / 2]), "", &["no shared library"]),
        ("nothing", folder.path().join("no.so"), "", &["cannot read the plugin"]),
        ("a link", link, "", &["symbolic link"]),
        ("anyone's", open, "", &["anyone may write", "chmod o-w"]),
        ("another hash", library().to_owned(), &pin, &["not the file that was meant", "found blake3"]),
    ];
    for (what, path, pin, expected) in cases {
        let (output, ran) = list(&path, pin);
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{what}: {text}");
        assert!(!ran, "{what}: its code has run");
        assert!(text.contains("help: ") && text.contains(&path.display().to_string()), "{what}: {text}");
        assert!(expected.iter().all(|expected| text.contains(expected)), "{what}: {text}");
    }
}

#[test]
#[ignore = "needs the runner with the feature `dynamic`"]
fn every_scaffold_builds_and_passes_its_checks() {
    let folder = tempfile::tempdir().expect("a folder");
    for kind in ["defense", "model", "task", "judge"] {
        let name = format!("my-own-{kind}");
        let made = titer().args(["plugin", "new", kind, &name]).current_dir(folder.path()).output().expect("a process");
        assert!(made.status.success(), "{}", stderr(&made));
        let checked = titer().args(["plugin", "check"]).arg(folder.path().join(&name)).output().expect("a process");
        let table = String::from_utf8_lossy(&checked.stdout).into_owned();
        assert!(checked.status.success() && table.contains(&name), "{table}{}", stderr(&checked));
    }
}

#[test]
#[ignore = "needs the stranger's own runner"]
fn a_runner_of_its_own_has_the_plugin_linked_in() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = config(folder.path(), "");
    let runner = || Command::new(assert_cmd::cargo::cargo_bin("stranger-titer"));
    check_results(&run(runner(), folder.path(), &config), &folder.path().join("out"));
    let listed = runner().args(["list", "defenses"]).output().expect("a process");
    assert!(String::from_utf8_lossy(&listed.stdout).contains("[stranger 0.1.0]"));
    let checked = runner().args(["plugin", "check"]).output().expect("a process");
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
}

fn blake3_of(path: &Path) -> String {
    let output = titer().args(["list", "--json", "--plugin"]).arg(path).output().expect("a process");
    let plugins: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let hash = plugins.as_array().and_then(|all| all.iter().find_map(|plugin| plugin["from"]["blake3"].as_str()));
    hash.expect("a hash").to_owned()
}
