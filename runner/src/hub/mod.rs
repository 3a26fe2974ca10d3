//! Models and data sets by their name on the Hugging Face hub, as in `HuggingFaceTB/SmolLM2-135M-Instruct` and
//! `hf://datasets/stanfordnlp/sst2`: found in the cache that Python's `huggingface_hub` keeps, or downloaded into it.
//!
//! This is written on ureq, since no version of the crate hf-hub does it: 1.0 needs tokio and reqwest; the synchronous client
//! of 0.5 takes a download of any length for the whole, goes on behind a part even if the server starts anew, waits for ever,
//! and can neither stay offline nor use `HF_HUB_CACHE`.
//!
//! Only the client is behind the feature `hub`; what is in the cache or in a mirror can be used without it.

mod cache;
pub mod data;
#[cfg(feature = "hub")]
mod http;
mod mirror;

use std::collections::BTreeSet;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use titer_core::bounds;
use titer_core::causal_lm::WEIGHTS;
use titer_core::event::Sink;
use titer_core::report::HubFiles;
use titer_core::weights::checkpoint::shards;
use titer_core::{Error, Result};

use cache::RepositoryCache;

/// The revision that a repository is taken at, unless another is named.
const MAIN: &str = "main";
/// What may stand before a repository's name.
const SCHEME: &str = "hf://";
/// What stands before the name of a data set.
const DATA_SETS: &str = "datasets/";
/// Where the hub is, unless `HF_ENDPOINT` says otherwise.
const ENDPOINT: &str = "https://huggingface.co";
/// The folder of an endpoint that is a mirror.
const MIRROR: &str = "file://";

const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// What a model is made of beside its weights, as far as the repository has it.
const COMPANIONS: [&str; 9] = [
    "chat_template.jinja",
    "chat_template.json",
    CONFIG,
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    TOKENIZER,
    "tokenizer_config.json",
    "vocab.json",
];
/// What weights end in that can run code when they are read.
const PICKLES: [&str; 4] = [".bin", ".pt", ".pth", ".ckpt"];

/// What to do where the repository holds no model.
const WRONG_REMEDY: &str = "take a repository in the form of transformers with a tokenizer.json; adapters are no models, and \
                            a GGUF file is given by its path";
/// What to do where nothing may be downloaded and something is missing.
const OFFLINE_REMEDY: &str =
    "download it once: run the same command without --offline and HF_HUB_OFFLINE; or set HF_HOME to where it is";

/// Whether `--offline` was given.
static OFFLINE: AtomicBool = AtomicBool::new(false);

/// Lets this process download nothing, as `HF_HUB_OFFLINE=1` does.
pub fn stay_offline() {
    OFFLINE.store(true, Ordering::Relaxed);
}

/// The name of a repository, and perhaps of one of its revisions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubName {
    /// `owner/name`, behind `datasets/` if it holds data.
    repository: String,
    /// A branch, a tag or a commit.
    revision: Option<String>,
    /// The folder that might have been meant, and that is not there.
    folder: Option<PathBuf>,
}

impl HubName {
    /// The repository that a path stands for if it leads to no file or folder: `owner/name`, or `hf://owner/name@revision`.
    /// `target` is where it leads.
    ///
    /// # Errors
    /// It begins with `hf://` and goes on otherwise.
    pub fn of(path: &Path, target: &Path) -> Result<Option<Self>> {
        let Some(text) = path.to_str().filter(|_| !target.exists()) else { return Ok(None) };
        let Some(named) = text.strip_prefix(SCHEME) else {
            let folder = std::path::absolute(target).ok();
            return Ok(is_repository(text).then(|| Self { repository: text.to_owned(), revision: None, folder }));
        };
        let (repository, revision) =
            named.split_once('@').map_or((named, None), |(repository, revision)| (repository, Some(revision)));
        if !is_repository(repository) {
            return Err(Error::config(format!("`{text}` names no repository of the hub"))
                .help("write hf://owner/name or hf://owner/name@revision"));
        }
        let name = Self { repository: repository.to_owned(), revision: None, folder: None };
        match revision {
            Some(revision) => name.at(revision).map(Some),
            None => Ok(Some(name)),
        }
    }

    /// The same at a revision.
    ///
    /// # Errors
    /// It has another one already, or none can be called so.
    pub fn at(self, revision: &str) -> Result<Self> {
        if let Some(other) = &self.revision {
            return Err(Error::config(format!("the revision is given twice: `{other}` and `{revision}`"))
                .help("name it either after the repository or as base.revision"));
        }
        if !is_inside(revision) {
            return Err(Error::config(format!("`{}` is no revision", bounds::shortened(revision)))
                .help("give a branch, a tag or a commit, as in revision = \"main\""));
        }
        Ok(Self { revision: Some(revision.to_owned()), ..self })
    }

    fn is_data(&self) -> bool {
        self.repository.starts_with(DATA_SETS)
    }

    fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or(MAIN)
    }

    /// Says which repository an error is about.
    fn locate(&self, error: Error) -> Error {
        let error = error.at("repository", &self.repository).at("revision", self.revision());
        match &self.folder {
            Some(folder) => error.at("folder", format!("{}: there is none", folder.display())),
            None => error,
        }
    }
}

/// A commit of a repository, and the names of its files.
struct Listing {
    commit: String,
    names: BTreeSet<String>,
}

/// What a server says of a file before it sends it.
struct Announced {
    /// What identifies the content.
    etag: String,
    size: u64,
}

/// The rest of a file, from one of its bytes on.
struct Rest {
    from: u64,
    body: Box<dyn Read>,
}

/// A server that speaks the hub's protocol.
trait Server {
    /// What a repository holds at the revision.
    fn list(&self, name: &HubName) -> Result<Listing>;

    /// What a file is.
    fn announce(&self, name: &HubName, commit: &str, file: &str) -> Result<Announced>;

    /// The content of a file from byte `from` on, or from its start if the server does not care.
    fn read(&self, name: &HubName, commit: &str, file: &str, from: u64) -> Result<Rest>;
}

/// The client, unless it was left out of this build.
#[cfg(feature = "hub")]
fn server(endpoint: &str) -> Result<Box<dyn Server>> {
    Ok(Box::new(http::Client::new(endpoint, cache::token()?)?))
}

#[cfg(not(feature = "hub"))]
fn server(_endpoint: &str) -> Result<Box<dyn Server>> {
    Err(Error::config(
        "this build of Titer downloads nothing, and a model or a data set is named by its repository on the hub",
    )
    .help("build it with `cargo build --release --features hub`, or give a path"))
}

/// Where files come from.
enum Hub {
    /// A folder with `owner/name` folders, which are used where they lie.
    Mirror(PathBuf),
    /// What is in the cache already.
    Cached,
    /// The cache, and a server for what it lacks.
    Online(Box<dyn Server>),
}

impl Hub {
    /// What the environment says.
    fn open() -> Result<Self> {
        let endpoint = cache::variable("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
        let offline = cache::variable("HF_HUB_OFFLINE").map(|value| value.to_uppercase());
        let offline = offline.is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&value.as_str()));
        if let Some(folder) = endpoint.strip_prefix(MIRROR) {
            Ok(Self::Mirror(PathBuf::from(folder)))
        } else if offline || OFFLINE.load(Ordering::Relaxed) {
            Ok(Self::Cached)
        } else {
            server(endpoint.trim_end_matches('/')).map(Self::Online)
        }
    }
}

/// The folder of a model, with all of its files but the weights, and what it is. Of a repository without the files of a model
/// nothing is downloaded.
///
/// # Errors
/// The repository cannot be reached, does not exist, may not be read, or holds no model that Titer could read; or there is no
/// space for it.
pub fn open(name: &HubName) -> Result<(HubFiles, PathBuf)> {
    take(name, WRONG_REMEDY, model_files)
}

/// The folder of a repository and what was taken of it: `choose` says which of its files, and has them brought into the folder.
/// It gets their names, the folder, what to do if one is missing, and what brings a file there.
fn take(
    name: &HubName,
    remedy: &str,
    choose: impl Fn(&BTreeSet<String>, &Path, &str, &dyn Fn(&str) -> Result<()>) -> Result<Vec<String>>,
) -> Result<(HubFiles, PathBuf)> {
    let found = || {
        let cache = RepositoryCache::new(name)?;
        match Hub::open()? {
            Hub::Mirror(root) => {
                let folder = root.join(&name.repository);
                let Listing { commit, names } = mirror::list(&folder)?;
                Ok((commit, choose(&names, &folder, remedy, &|_| Ok(()))?, folder))
            }
            Hub::Cached => {
                let Listing { commit, names } = cache.list(name.revision())?;
                let folder = cache.snapshot(&commit);
                Ok((commit, choose(&names, &folder, OFFLINE_REMEDY, &|_| Ok(()))?, folder))
            }
            Hub::Online(server) => {
                let Listing { commit, names } = server.list(name)?;
                let folder = cache.snapshot(&commit);
                let get = |file: &str| cache.download(&*server, name, &commit, file, None);
                let files = choose(&names, &folder, remedy, &get)?;
                cache.note(name.revision(), &commit)?;
                Ok((commit, files, folder))
            }
        }
    };
    let (commit, files, folder) = found().map_err(|error| name.locate(error))?;
    let (repository, revision) = (name.repository.clone(), name.revision().to_owned());
    Ok((HubFiles { repository, revision, commit, files }, folder))
}

/// Downloads the weights of a model that was opened, as far as they are not there, and tells `sink` about it.
///
/// # Errors
/// A file is missing, the connection broke, or the disk is full. What was downloaded stays, for the next time to go on.
pub fn fetch_weights(model: &HubFiles, sink: &dyn Sink) -> Result<()> {
    let HubFiles { repository, revision, commit, files } = model;
    let name = HubName { repository: repository.clone(), revision: Some(revision.clone()), folder: None };
    let fetch = || {
        let cache = RepositoryCache::new(&name)?;
        let (folder, server, remedy) = match Hub::open()? {
            Hub::Mirror(root) => (root.join(repository), None, "copy the file into the mirror"),
            Hub::Cached => (cache.snapshot(commit), None, OFFLINE_REMEDY),
            Hub::Online(server) => (cache.snapshot(commit), Some(server), ""),
        };
        for file in files.iter().filter(|file| !folder.join(file).is_file()) {
            match &server {
                Some(server) => cache.download(&**server, &name, commit, file, Some(sink))?,
                None => return Err(Error::data(format!("`{file}` is missing")).file(folder).help(remedy)),
            }
        }
        Ok(())
    };
    fetch().map_err(|error| name.locate(error))
}

/// The folder of a model that is given as a folder or by its name on the hub, with all of its files.
///
/// # Errors
/// As [`open`] and [`fetch_weights`].
pub fn model_folder(path: &Path, sink: &dyn Sink) -> Result<PathBuf> {
    let Some(name) = HubName::of(path, path)? else { return Ok(path.to_owned()) };
    let (model, folder) = open(&name)?;
    fetch_weights(&model, sink)?;
    Ok(folder)
}

/// The files of a model among `names`, sorted. Those that are no weights are brought into `folder` by `get`. `remedy` says what
/// to do if one is missing.
fn model_files(
    names: &BTreeSet<String>,
    folder: &Path,
    remedy: &str,
    get: &dyn Fn(&str) -> Result<()>,
) -> Result<Vec<String>> {
    // Only names that are known here are taken, but a repository with such a name means no good.
    let leaves = |name: &str| name.starts_with('/') || name.split(['/', '\\']).any(|part| part == "..");
    if let Some(name) = names.iter().find(|name| leaves(name)) {
        return Err(Error::data(format!("the repository names a file outside of it: `{}`", name.escape_debug()))
            .help("do not use this repository, and check HF_ENDPOINT"));
    }
    let has = |file: &str| names.contains(file);
    if !has(SINGLE) && !has(INDEX) {
        let pickle = names.iter().find(|name| PICKLES.iter().any(|end| name.ends_with(end)));
        return Err(match pickle {
            Some(pickle) => Error::data(format!("the weights are in `{pickle}`, which can run code when it is read"))
                .help("take a revision with safetensors, as pull requests of the repository may hold, or convert them"),
            None => Error::data(format!("there is neither `{SINGLE}` nor `{INDEX}`")).file(folder).help(remedy),
        });
    }
    if let Some(missing) = [CONFIG, TOKENIZER].into_iter().find(|file| !has(file)) {
        return Err(Error::data(format!("there is no `{missing}`")).file(folder).help(remedy));
    }
    let mut files: Vec<String> = COMPANIONS.into_iter().filter(|file| has(file)).map(str::to_owned).collect();
    files.iter().try_for_each(|file| get(file))?;
    // As the loader does, which reads the index if there is one.
    if has(INDEX) {
        get(INDEX)?;
        files.push(INDEX.to_owned());
        let index = folder.join(INDEX);
        let shards = shards(&index)?;
        let fits = |name: &str| is_inside(name) && Path::new(name).extension().is_some_and(|found| found == WEIGHTS);
        if let Some(name) = shards.iter().find(|name| !fits(name)) {
            let name = name.escape_debug();
            return Err(Error::data(format!(
                "the shard index names `{name}`, which is no file of safetensors beside it"
            ))
            .file(index)
            .help("do not use this repository, and check HF_ENDPOINT"));
        }
        files.extend(shards);
    } else {
        files.push(SINGLE.to_owned());
    }
    files.sort();
    Ok(files)
}

/// Whether the hub could have a repository of this name.
fn is_repository(text: &str) -> bool {
    const LONGEST: usize = 96;
    let fits = |part: &str| {
        is_plain(part)
            && part.len() <= LONGEST
            && !part.starts_with('-')
            && !part.ends_with(['-', '.'])
            && !part.contains("--")
            && !part.contains("..")
    };
    text.split_once('/').is_some_and(|(owner, name)| fits(owner) && fits(name))
}

/// Whether this is a plain name of one file: what a server says becomes names in the cache.
fn is_plain(name: &str) -> bool {
    const LONGEST: usize = 200;
    let letter = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=LONGEST).contains(&name.len()) && name.bytes().all(letter) && !name.starts_with('.')
}

/// Whether a name with slashes leads to a place below the folder that it is joined to, on every system.
fn is_inside(name: &str) -> bool {
    let stays = |part: &str| !part.is_empty() && part != "." && part != "..";
    name.len() <= 1000 && name.split('/').all(stays) && !name.contains(['\\', ':']) && !name.contains(char::is_control)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(files: &[&str]) -> BTreeSet<String> {
        files.iter().map(|&file| file.to_owned()).collect()
    }

    #[test]
    fn repositories_are_told_from_paths() {
        let folder = tempfile::tempdir().unwrap();
        let parse = |text: &str| HubName::of(Path::new(text), &folder.path().join(text));
        for (text, repository, revision) in [
            ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M", MAIN),
            ("hf://a/b", "a/b", MAIN),
            ("hf://a/b@refs/pr/1", "a/b", "refs/pr/1"),
        ] {
            let name = parse(text).unwrap().unwrap();
            assert_eq!((name.repository.as_str(), name.revision()), (repository, revision));
        }
        for path in
            ["model", "a/b/c", "/a/b", "./a", "../a", "a/..", "a/.b", "a/b--c", "a/-b", "a/b.", "a b/c", "a/b@c", ""]
        {
            assert_eq!(parse(path).unwrap(), None, "{path}");
        }
        std::fs::create_dir_all(folder.path().join("a/b")).unwrap();
        assert_eq!(parse("a/b").unwrap(), None, "a folder goes before a name");
        for wrong in ["hf://a", "hf://a/b/c", "hf://", "hf://../b", "hf://a/b@", "hf://a/b@../c", "hf://a/b@/c"] {
            let error = parse(wrong).unwrap_err();
            assert!(error.remedy().is_some(), "{error}");
        }
        assert!(parse("hf://a/b@c").unwrap().unwrap().at("d").unwrap_err().message().contains("twice"));
    }

    #[test]
    fn names_stay_inside() {
        for inside in ["a", "a/b.json", "refs/pr/1", "v1.0", ".gitattributes", "a/é"] {
            assert!(is_inside(inside), "{inside}");
        }
        for outside in ["", "..", "a/../b", "/a", "a//b", "a/", "./a", "a\\b", "C:a", "a\0", "a\nb"] {
            assert!(!is_inside(outside), "{outside}");
        }
        assert!(is_plain("a1-._") && ![".", "..", "a/b", "", "W\""].into_iter().any(is_plain));
    }

    #[test]
    fn a_model_is_its_weights_and_what_stands_beside_them() {
        let folder = tempfile::tempdir().unwrap();
        let files = |found: &[&str]| model_files(&names(found), folder.path(), WRONG_REMEDY, &|_| Ok(()));
        let single = ["README.md", CONFIG, SINGLE, TOKENIZER, "onnx/model.onnx", "pytorch_model.bin", "vocab.json"];
        assert_eq!(files(&single).unwrap(), [CONFIG, SINGLE, TOKENIZER, "vocab.json"]);
        let index = |map: serde_json::Value| {
            std::fs::write(folder.path().join(INDEX), serde_json::json!({ "weight_map": map }).to_string()).unwrap();
            files(&[CONFIG, INDEX, SINGLE, TOKENIZER])
        };
        let sharded = index(serde_json::json!({ "a": "2.safetensors", "b": "1.safetensors", "c": "2.safetensors" }));
        assert_eq!(sharded.unwrap(), ["1.safetensors", "2.safetensors", CONFIG, INDEX, TOKENIZER]);
        for map in ["../1.safetensors", "/1.safetensors", "1.bin"] {
            let error = index(serde_json::json!({ "a": map })).unwrap_err().to_string();
            assert!(error.contains("names") && error.contains("help: "), "{error}");
        }
        for (found, expected) in [
            (&[CONFIG, TOKENIZER, "pytorch_model.bin"][..], "can run code"),
            (&[CONFIG, TOKENIZER], "neither"),
            (&[SINGLE, CONFIG], "no `tokenizer.json`"),
            (&[SINGLE, TOKENIZER], "no `config.json`"),
            (&[SINGLE, CONFIG, TOKENIZER, "../evil"], "outside"),
        ] {
            let error = files(found).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains("help: "), "{error}");
        }
    }
}
