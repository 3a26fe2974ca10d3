//! Where a plugin's copy of the core comes from, and the compilation against it.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use titer_core::error::io_error;
use titer_core::registry::plugin::FINGERPRINT;
use titer_core::{Error, Result};

use super::super::new::checkout;
use crate::plugins::dynamic;

/// Compiles the plugin crate in `folder` against the core of this runner, and gives the shared library.
///
/// # Errors
/// It does not compile, or the target folder of this runner is gone.
pub(in crate::cli::commands::plugin) fn build(folder: &Path) -> Result<PathBuf> {
    let manifest = folder.join("Cargo.toml");
    if !manifest.is_file() {
        let error = Error::config("the folder holds no crate").file(&manifest);
        return Err(error.help("name the plugin's folder; `titer plugin new` makes one"));
    }
    let core = dynamic::shared_core()?;
    let sdk = Sdk::find()?;
    let mut cargo = cargo("rustc", &manifest);
    cargo.args(["--lib", "--crate-type", "cdylib", "--no-default-features"]);
    // Other codegen units make other crates of the plugin's own dependencies, should the core have them, too.
    for profile in ["dev", "release"] {
        cargo.args(["--config", &format!("profile.{profile}.package.\"*\".codegen-units=17")]);
    }
    if sdk.profile != "dev" {
        cargo.arg("--release");
    }
    cargo.arg("--").args(sdk.flags());
    let built = artifacts(&mut cargo, "the plugin does not compile")?;
    let library = built.iter().rev().flat_map(|artifact| &artifact.files).find(|file| has_extension(file, "so"));
    let library = library.ok_or_else(|| Error::run("cargo names no shared library").file(&manifest))?;
    let bytes = std::fs::read(library).map_err(|error| io_error("read", library, error))?;
    dynamic::check(&bytes, &core).map_err(|error| error.file(library))?;
    Ok(library.clone())
}

/// The files that this runner was linked from.
struct Sdk {
    /// The profile of this runner, as cargo calls it.
    profile: &'static str,
    /// Crates that a plugin may name, by the name it gives them.
    crates: BTreeMap<String, PathBuf>,
    /// The folder of all others.
    dependencies: PathBuf,
}

impl Sdk {
    /// Asks cargo, which does nothing more if the runner is up to date.
    fn find() -> Result<Self> {
        let profile = match field("profile") {
            "debug" => "dev",
            profile => profile,
        };
        let manifest = checkout().join("Cargo.toml");
        let target = target_folder()?;
        let mut features = vec!["dynamic"];
        features.extend(cfg!(feature = "cuda").then_some("cuda"));
        let mut command = cargo("build", &manifest);
        command.args(["--locked", "--package", "titer", "--profile", profile, "--features", &features.join(",")]);
        command.arg("--target-dir").arg(&target);
        let artifacts = artifacts(&mut command, "the runner cannot be built from its sources")?;
        if artifacts.iter().any(|artifact| artifact.name == "titer" && !artifact.fresh) {
            return Err(Error::config("this runner was older than its sources; it has been built again")
                .help("run the same command once more"));
        }
        let mut crates: BTreeMap<String, PathBuf> = BTreeMap::new();
        for (name, package) in core_dependencies(&manifest)? {
            crates.extend(rlib(&artifacts, |artifact| artifact.package == package).map(|file| (name, file)));
        }
        let facade = rlib(&artifacts, |artifact| artifact.name == "titer_facade");
        let facade = facade.ok_or_else(|| Error::run("cargo names no facade").file(&manifest))?;
        let dependencies = facade.parent().unwrap_or(&target).to_owned();
        crates.insert("titer_core".into(), facade);
        Ok(Self { profile, crates, dependencies })
    }

    /// What rustc is told.
    fn flags(&self) -> Vec<OsString> {
        let mut flags = Vec::new();
        for (name, file) in &self.crates {
            let mut pair = OsString::from(format!("{name}="));
            pair.push(file);
            flags.extend(["--extern".into(), pair]);
        }
        let mut folder = OsString::from("dependency=");
        folder.push(&self.dependencies);
        flags.extend(["-L".into(), folder]);
        flags
    }
}

/// What the core of this runner was built with.
fn field(name: &str) -> &'static str {
    FINGERPRINT.iter().find(|(field, _)| *field == name).map_or("", |(_, value)| value)
}

/// The target folder that this runner lies in: `<target>/<profile>/titer`.
fn target_folder() -> Result<PathBuf> {
    let runner = std::env::current_exe().map_err(|error| Error::run("the runner cannot find itself").source(error))?;
    let profile = runner.parent().filter(|folder| folder.join("deps").is_dir());
    profile.and_then(Path::parent).map(Path::to_owned).ok_or_else(|| {
        Error::config("this runner lies in no target folder, so what it was linked from cannot be found")
            .file(&runner)
            .help("use the runner where cargo has put it, such as target/release/titer")
    })
}

fn cargo(command: &str, manifest: &Path) -> Command {
    // The cargo of an outer cargo, such as that of a test, is another version's only if the user wants it so.
    let mut cargo = Command::new("cargo");
    cargo.arg(command).arg("--manifest-path").arg(manifest);
    cargo
}

/// What cargo has built, or found to be up to date.
struct BuiltArtifact {
    package: String,
    name: String,
    files: Vec<PathBuf>,
    fresh: bool,
}

impl BuiltArtifact {
    /// The artifact that a message tells of.
    fn of(message: &Value) -> Option<Self> {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        Some(Self {
            package: text(&message["package_id"])?,
            name: text(&message["target"]["name"])?,
            files: message["filenames"].as_array()?.iter().filter_map(Value::as_str).map(PathBuf::from).collect(),
            fresh: message["fresh"].as_bool()?,
        })
    }
}

/// Runs cargo, which tells the user about its progress, and reads what it tells us.
fn artifacts(cargo: &mut Command, failure: &str) -> Result<Vec<BuiltArtifact>> {
    // Before `--`, behind which all is rustc's.
    let mut whole = Command::new(cargo.get_program());
    let mut arguments = cargo.get_args();
    whole.args(arguments.next());
    whole.arg("--message-format=json-render-diagnostics").args(arguments);
    let text = output(&mut whole, failure)?;
    let messages = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    Ok(messages.filter_map(|message| BuiltArtifact::of(&message)).collect())
}

fn output(command: &mut Command, failure: &str) -> Result<String> {
    // What an outer cargo has told about its own package, build scripts take for news: they run again.
    for name in std::env::vars_os().filter_map(|(name, _)| name.into_string().ok()) {
        if name == "OUT_DIR" || name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") {
            command.env_remove(name);
        }
    }
    let started = command.stderr(Stdio::inherit()).output();
    let output = started.map_err(|error| {
        let error = Error::config("cannot start cargo").source(error);
        error.help("install Rust, with the version of the compiler that built this runner")
    })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(Error::run(failure).help("cargo says why above"))
}

/// The crates that the core depends on: name in Rust and package.
fn core_dependencies(manifest: &Path) -> Result<Vec<(String, String)>> {
    let mut metadata = cargo("metadata", manifest);
    // Without the filter, cargo would fetch the crates of every other system.
    metadata.args(["--locked", "--format-version", "1", "--filter-platform", field("target")]);
    let text = output(&mut metadata, "the workspace of the runner cannot be read")?;
    let metadata: Value =
        serde_json::from_str(&text).map_err(|error| Error::run("cargo's metadata is no JSON").source(error))?;
    let items = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let core = items(&metadata["packages"]).into_iter().find(|package| package["name"] == "titer-core");
    let core = core.map_or(Value::Null, |package| package["id"].clone());
    let node = items(&metadata["resolve"]["nodes"]).into_iter().find(|node| node["id"] == core).unwrap_or_default();
    let normal = |dependency: &Value| items(&dependency["dep_kinds"]).iter().any(|kind| kind["kind"].is_null());
    let named =
        |dependency: &Value| Some((dependency["name"].as_str()?.to_owned(), dependency["pkg"].as_str()?.to_owned()));
    Ok(items(&node["deps"]).iter().filter(|dependency| normal(dependency)).filter_map(named).collect())
}

/// The last library that fits: cargo builds what build scripts need before what the runner needs.
fn rlib(artifacts: &[BuiltArtifact], fits: impl Fn(&BuiltArtifact) -> bool) -> Option<PathBuf> {
    let files = artifacts.iter().rev().filter(|artifact| fits(artifact)).flat_map(|artifact| &artifact.files);
    files.into_iter().find(|file| has_extension(file, "rlib")).cloned()
}

fn has_extension(file: &Path, extension: &str) -> bool {
    file.extension().is_some_and(|found| found == extension)
}
