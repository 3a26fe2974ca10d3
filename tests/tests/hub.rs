//! Models by their name on the hub, against a small server of its protocol.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use titer_tests::cli::{PRETRAINED, answers, results, run, small, stderr, titer};

const ID: &str = "tiny/world";
const DATA: &str = "datasets/tiny/rows";
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const TOKEN: &str = "hf_thisMustStaySecret";
const WEIGHTS: &str = "model.safetensors";

type Files = BTreeMap<String, Vec<u8>>;

/// The files of a model that was pretrained for a moment.
static MODEL: LazyLock<Files> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a folder");
    let mut command = titer();
    command.arg("pretrain").arg(small(folder.path(), &[])).arg("--store").arg(folder.path().join("store"));
    let output = command.output().expect("it runs");
    assert!(output.status.success(), "{}", stderr(&output));
    let told = String::from_utf8(output.stdout).expect("text");
    let (_, model) = told.trim().rsplit_once(": ").expect("a folder");
    let names = ["config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS];
    names
        .into_iter()
        .map(|name| (name.to_owned(), std::fs::read(Path::new(model).join(name)).expect("a file")))
        .collect()
});

/// A request that a server got.
#[derive(Debug, Clone)]
struct Asked {
    /// Whether the hub was asked, or else the host with the large files.
    hub: bool,
    /// `GET /path`.
    line: String,
    headers: BTreeMap<String, String>,
}

/// How the servers behave.
#[derive(Debug, Default)]
struct Behaviour {
    /// Every question to the hub is answered so.
    refuse: Option<u16>,
    /// The next large file ends after so many bytes.
    cut: Option<usize>,
    /// The next large file is followed by a byte too many.
    longer: bool,
    /// Ranges are not known.
    whole: bool,
    /// Large files never come.
    silent: bool,
    /// More names of files, which are not there.
    siblings: Vec<&'static str>,
}

/// The hub, and the host that it redirects to.
struct TestHub {
    address: String,
    state: Arc<State>,
}

struct State {
    files: Files,
    storage: String,
    asked: Mutex<Vec<Asked>>,
    behaviour: Mutex<Behaviour>,
}

impl TestHub {
    fn new(files: Files) -> Self {
        let [hub, storage] = [(), ()].map(|()| TcpListener::bind("127.0.0.1:0").expect("a port"));
        let address = |listener: &TcpListener| format!("http://{}", listener.local_addr().expect("an address"));
        let (address, storage_address) = (address(&hub), address(&storage));
        let state = State { files, storage: storage_address, asked: Mutex::default(), behaviour: Mutex::default() };
        let state = Arc::new(state);
        for (listener, is_hub) in [(hub, true), (storage, false)] {
            let state = state.clone();
            std::thread::spawn(move || {
                for stream in listener.incoming().map_while(Result::ok) {
                    let state = state.clone();
                    // Whoever goes away early is no mistake here.
                    std::thread::spawn(move || state.answer(is_hub, stream).ok());
                }
            });
        }
        Self { address, state }
    }

    fn behave(&self, behaviour: Behaviour) {
        *self.state.behaviour.lock().expect("a lock") = behaviour;
    }

    /// What was asked since the last time.
    fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.state.asked.lock().expect("a lock"))
    }

    /// A command with this hub, and its cache in `folder`.
    fn with(&self, folder: &Path, mut command: Command) -> Command {
        command
            .env_remove("HF_HUB_OFFLINE")
            .env("HF_ENDPOINT", &self.address)
            .env("HF_HOME", folder.join("hf"))
            .env("NO_PROXY", "127.0.0.1");
        command
    }

    /// `titer plan --json` of an experiment on the hub's model.
    fn plan(&self, folder: &Path, arguments: &[&str]) -> Output {
        self.planning(folder, &experiment(folder), arguments).output().expect("it runs")
    }

    /// `titer plan --json` of a configuration, to be run.
    fn planning(&self, folder: &Path, config: &Path, arguments: &[&str]) -> Command {
        let mut command = self.with(folder, titer());
        command.arg("plan").arg(config).args(arguments).args(["--json", "--store"]).arg(folder.join("store"));
        command
    }
}

impl State {
    fn answer(&self, hub: bool, mut stream: TcpStream) -> std::io::Result<()> {
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        let first = lines.next().unwrap_or_else(|| Ok(String::new()))?;
        let line = first.trim_end_matches(" HTTP/1.1").to_owned();
        let mut headers = BTreeMap::new();
        for header in lines {
            let header = header?;
            let Some((name, value)) = header.split_once(": ") else { break };
            headers.insert(name.to_lowercase(), value.to_owned());
        }
        self.asked.lock().expect("a lock").push(Asked { hub, line: line.clone(), headers: headers.clone() });
        let (method, path) = line.split_once(' ').expect("a method and a path");
        let (status, more, body) = if hub { self.of_hub(path) } else { self.of_storage(path, headers.get("range")) };
        let length = body.len();
        write!(stream, "HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Length: {length}\r\n{more}\r\n")?;
        if method == "HEAD" {
            return Ok(());
        }
        let (cut, silent) = {
            let mut behaviour = self.behaviour.lock().expect("a lock");
            (if hub { None } else { behaviour.cut.take() }, behaviour.silent && !hub)
        };
        if silent {
            std::thread::sleep(Duration::from_secs(20));
        }
        stream.write_all(&body[..cut.unwrap_or(length).min(length)])
    }

    /// Status, headers and body of the hub's answer.
    fn of_hub(&self, path: &str) -> (u16, String, Vec<u8>) {
        let behaviour = self.behaviour.lock().expect("a lock");
        if let Some(status) = behaviour.refuse {
            return (status, String::new(), b"no".to_vec());
        }
        let none = (404, String::new(), Vec::new());
        let known = ["main", "refs%2Fpr%2F1", "refs%2Fconvert%2Fparquet"].into_iter().any(|revision| {
            [format!("models/{ID}"), DATA.to_owned()].iter().any(|of| path == format!("/api/{of}/revision/{revision}"))
        });
        if known {
            let names =
                self.files.keys().map(String::as_str).chain(behaviour.siblings.iter().copied()).chain(["README.md"]);
            let siblings: Vec<Value> = names.map(|name| json!({ "rfilename": name })).collect();
            return (200, String::new(), json!({ "sha": COMMIT, "siblings": siblings }).to_string().into_bytes());
        }
        let moved = path.strip_prefix("/moved");
        let of = |id: &str| moved.unwrap_or(path).strip_prefix(&format!("/{id}/resolve/{COMMIT}/")).map(str::to_owned);
        let file = of(ID).or_else(|| of(DATA));
        let Some((file, bytes)) = file.and_then(|file| Some((file.clone(), self.files.get(&file)?))) else {
            return none;
        };
        let etag = blake3::hash(bytes).to_hex();
        if file.ends_with(".safetensors") {
            let (storage, size) = (&self.storage, bytes.len());
            let told = format!("X-Repo-Commit: {COMMIT}\r\nX-Linked-Etag: \"{etag}\"\r\nX-Linked-Size: {size}\r\n");
            return (
                302,
                format!("{told}ETag: \"other\"\r\nLocation: {storage}/{file}?signature=x\r\n"),
                b"moved".to_vec(),
            );
        }
        // As the hub does, small files move within it.
        if moved.is_none() {
            return (307, format!("Location: /moved{path}\r\n"), b"moved".to_vec());
        }
        (200, format!("X-Repo-Commit: {COMMIT}\r\nETag: W/\"{etag}\"\r\n"), bytes.clone())
    }

    fn of_storage(&self, path: &str, range: Option<&String>) -> (u16, String, Vec<u8>) {
        let behaviour = self.behaviour.lock().expect("a lock");
        let (name, _) = path.split_once('?').expect("a signature");
        let mut bytes = self.files[&name[1..]].clone();
        if behaviour.longer {
            bytes.push(0);
        }
        let from = range.and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
        match from.filter(|_| !behaviour.whole) {
            Some(from) => {
                let told = format!("Content-Range: bytes {from}-{}/{}\r\n", bytes.len() - 1, bytes.len());
                (206, told, bytes.split_off(from))
            }
            None => (200, String::new(), bytes),
        }
    }
}

/// The small experiment on the hub's model.
fn experiment(folder: &Path) -> PathBuf {
    small(
        folder,
        &[(PRETRAINED, &format!("path = \"{ID}\"")), ("harmful_ratios = [0.0, 0.2]", "harmful_ratios = [0.2]")],
    )
}

/// The cache's folder of the model.
fn cached(folder: &Path) -> PathBuf {
    folder.join("hf/hub/models--tiny--world")
}

fn snapshot(folder: &Path) -> PathBuf {
    cached(folder).join("snapshots").join(COMMIT)
}

/// The only blob that is not whole.
fn incomplete(folder: &Path) -> Vec<u8> {
    let etag = blake3::hash(&MODEL[WEIGHTS]).to_hex();
    std::fs::read(cached(folder).join(format!("blobs/{etag}.incomplete"))).expect("a part")
}

fn told(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &stderr(output)
}

/// Fails unless the command failed with this code and said these things, a remedy among them.
fn refused(output: &Output, code: i32, parts: &[&str]) {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(code), "{text}");
    for part in parts.iter().chain(&["help: "]) {
        assert!(text.contains(part), "no `{part}` in\n{text}");
    }
}

/// The plan that a command printed.
fn plan_of(output: &Output) -> Value {
    assert!(output.status.success(), "{}", stderr(output));
    serde_json::from_slice(&output.stdout).expect("a plan")
}

fn keys(plan: &Value) -> Vec<&str> {
    plan["stages"].as_array().expect("stages").iter().map(|stage| stage["key"].as_str().expect("a key")).collect()
}

/// The small experiment with user data of the hub.
fn experiment_on(folder: &Path, train: &str, test: &str) -> PathBuf {
    let task = format!(
        "{{ name = \"own\", task = \"rows\", train = {train:?}, test = {test:?}, scoring = \"exact\", max_new_tokens = 4 }}"
    );
    let ratios = ("harmful_ratios = [0.0, 0.2]", "harmful_ratios = [0.2]");
    small(folder, &[("{ name = \"agnews\", task = \"world-agnews\" }", &task), ratios])
}

/// Data is named as in other clients, and its content counts, not where it lies.
#[test]
fn rows_of_the_hub_are_taken_by_name() {
    let tokenizer: Value = serde_json::from_slice(&MODEL["tokenizer.json"]).expect("JSON");
    let words = tokenizer["model"]["vocab"].as_object().expect("a vocabulary").keys();
    let words: Vec<&String> = words.filter(|word| !word.starts_with('<')).take(2).collect();
    let row = json!({ "instruction": words[0], "output": words[1] }).to_string() + "\n";
    let names = ["own/train/a-0.jsonl", "own/test.jsonl", "other.jsonl", "README.md"];
    let files: Files = names.map(|name| (name.to_owned(), row.repeat(20).into_bytes())).into();
    let (hub, folder) = (TestHub::new(files.clone()), tempfile::tempdir().expect("a folder"));
    let folder = folder.path();

    let config = experiment_on(
        folder,
        &format!("hf://{DATA}@~parquet/own/train/a-*.jsonl"),
        &format!("hf://{DATA}@refs/convert/parquet/own/test.jsonl"),
    );
    let output = hub.with(folder, run(folder, &config)).output().expect("it runs");
    assert!(output.status.success(), "{}", stderr(&output));
    let asked = hub.asked();
    assert!(
        !asked.iter().any(|request| request.line.contains("other") || request.line.contains("README")),
        "{asked:#?}"
    );
    let expected = |file: &str| json!({ "repository": DATA, "revision": "refs/convert/parquet", "commit": COMMIT, "files": [file] });
    let results = results(&folder.join("out"));
    assert_eq!(results["provenance"]["hub_data"], json!([expected(names[1]), expected(names[0])]));
    let snapshot = folder.join("hf/hub/datasets--tiny--rows/snapshots").join(COMMIT);
    assert_eq!(std::fs::read(snapshot.join(names[0])).expect("a file"), files[names[0]]);

    let plan = |config: &Path, arguments: &[&str], endpoint: &str| {
        hub.planning(folder, config, arguments).env("HF_ENDPOINT", endpoint).output().expect("it runs")
    };
    let online = plan(&config, &[], &hub.address);
    let all_cached =
        |plan: &Value| plan["stages"].as_array().expect("stages").iter().all(|stage| stage["cached"] == true);
    assert!(all_cached(&plan_of(&online)));
    hub.asked();
    assert_eq!(keys(&plan_of(&plan(&config, &["--offline"], &hub.address))), keys(&plan_of(&online)));
    assert!(hub.asked().is_empty());
    let mirror = folder.join("mirror");
    write_files(&mirror.join(DATA), &files);
    let mirrored = plan(&config, &[], &format!("file://{}", mirror.display()));
    assert_eq!(keys(&plan_of(&mirrored)), keys(&plan_of(&online)));
    let local = mirror.join(DATA);
    let (train, test) = (local.join("own/train/a-0.jsonl"), local.join("own/test.jsonl"));
    let local = plan(&experiment_on(folder, &train.to_string_lossy(), &test.to_string_lossy()), &[], &hub.address);
    assert_eq!(keys(&plan_of(&local)), keys(&plan_of(&online)));

    let wrong = |train: &str| plan(&experiment_on(folder, train, train), &[], &hub.address);
    refused(&wrong(&format!("hf://{DATA}/own/trian")), 3, &["no `own/trian`", "fine_tune.tasks.0.test", DATA]);
    refused(&wrong("hf://datasets/tiny"), 2, &["names no data set", "fine_tune.tasks.0.test"]);
    refused(&wrong("hf://datasets/tiny/none/a.jsonl"), 3, &["does not give `datasets/tiny/none`"]);
    hub.behave(Behaviour { refuse: Some(403), ..Behaviour::default() });
    refused(&wrong(&format!("hf://{DATA}/own/test.jsonl")), 3, &["403", "HF_TOKEN"]);
}

#[test]
fn a_cell_runs_on_a_model_of_the_hub_and_knows_where_it_is_from() {
    let (hub, folder) = (TestHub::new(MODEL.clone()), tempfile::tempdir().expect("a folder"));
    let folder = folder.path();
    let config = experiment(folder);
    let mut command = hub.with(folder, run(folder, &config));
    let output = command.env("HF_TOKEN", TOKEN).arg("-vvv").output().expect("it runs");
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(told(&output).contains("download model.safetensors"), "{}", stderr(&output));

    // The token is for the hub alone.
    let asked = hub.asked();
    let bearer = format!("Bearer {TOKEN}");
    for request in &asked {
        let expected = request.hub.then_some(&bearer);
        assert_eq!(request.headers.get("authorization"), expected, "{request:?}");
    }
    assert_eq!(asked.iter().filter(|request| !request.hub).count(), 1, "{asked:#?}");
    assert_eq!(asked.iter().filter(|request| request.line.contains("/api/")).count(), 1, "one commit for all files");
    assert!(!asked.iter().any(|request| request.line.contains("README")), "{asked:#?}");
    assert!(!told(&output).contains(TOKEN));
    let written =
        walk(&folder.join("out")).into_iter().chain(walk(&folder.join("store"))).chain(walk(&folder.join("hf")));
    for file in written {
        let bytes = std::fs::read(&file).expect("a file");
        assert!(!bytes.windows(TOKEN.len()).any(|window| window == TOKEN.as_bytes()), "{}", file.display());
    }

    // Where it is from.
    let files: Vec<&String> = MODEL.keys().collect();
    let expected = json!({ "repository": ID, "revision": "main", "commit": COMMIT, "files": files });
    assert_eq!(results(&folder.join("out"))["provenance"]["hub"], expected);
    let explained = titer().arg("explain").arg(folder.join("out")).arg("SFT").output().expect("it runs");
    assert!(told(&explained).contains(COMMIT), "{}", told(&explained));

    // Python's layout.
    assert_eq!(std::fs::read_to_string(cached(folder).join("refs/main")).expect("a file"), COMMIT);
    for (name, bytes) in MODEL.iter() {
        let link = snapshot(folder).join(name);
        let to = std::fs::read_link(&link).expect("a link");
        assert_eq!(to, Path::new("../../blobs").join(blake3::hash(bytes).to_hex().as_str()));
        assert_eq!(&std::fs::read(&link).expect("a file"), bytes);
    }
    assert_eq!(std::fs::read_dir(cached(folder).join("blobs")).expect("blobs").count(), MODEL.len());

    // The second time nothing is downloaded, and nothing is computed.
    let output = hub.with(folder, run(folder, &config)).output().expect("it runs");
    assert!(stderr(&output).contains(" 0 stages ran"), "{}", stderr(&output));
    let asked = hub.asked();
    assert!(asked.len() == 1 && asked[0].line.contains("/api/"), "{asked:#?}");

    // The content counts, not the name: a folder with the same files is the same model.
    let online = hub.plan(folder, &[]);
    let copy = folder.join("copy");
    write_files(&copy, &MODEL);
    let of_copy = hub.plan(folder, &["--set", &format!("base.path={}", copy.display())]);
    assert_eq!(keys(&plan_of(&online)), keys(&plan_of(&of_copy)));
    // What others take into the same folder of the cache changes nothing.
    std::fs::write(snapshot(folder).join("training_args.json"), "{}").expect("a file");
    assert_eq!(keys(&plan_of(&hub.plan(folder, &[]))), keys(&plan_of(&online)));

    // Offline all comes from the cache.
    hub.asked();
    let offline = hub.plan(folder, &["--offline"]);
    assert_eq!(keys(&plan_of(&offline)), keys(&plan_of(&online)));
    let mut command = hub.with(folder, titer());
    command.env("HF_HUB_OFFLINE", "1").args(["generate", "--model", ID, "--template", "chat", "--max-new-tokens", "2"]);
    let (_, lines) = &answers(&folder.join("out"))[0];
    let answer: Value = serde_json::from_str(lines.lines().next().expect("a line")).expect("JSON");
    let output =
        command.arg("--prompt").arg(answer["instruction"].as_str().expect("a prompt")).output().expect("it runs");
    assert!(output.status.success(), "{}", stderr(&output));
    let mut command = hub.with(folder, titer());
    command.args(["--offline", "bench", "generate", "--model", ID, "--length", "4", "--new", "2", "--batch", "1"]);
    let output = command.args(["--repeat", "1", "--warmup", "0"]).output().expect("it runs");
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(hub.asked().is_empty());
    std::fs::remove_file(snapshot(folder).join(WEIGHTS)).expect("gone");
    refused(&hub.plan(folder, &["--offline"]), 3, &["neither `model.safetensors`", "--offline", ID]);

    // An adapter names the model as others know it.
    plan_of(&hub.plan(folder, &[]));
    let mut command = titer();
    command.arg("export").arg(folder.join("out")).args(["SFT", "--to", "peft", "--out"]).arg(folder.join("adapter"));
    let output = command.arg("--store").arg(folder.join("store")).output().expect("it runs");
    assert!(output.status.success(), "{}", stderr(&output));
    let config = std::fs::read(folder.join("adapter/adapter_config.json")).expect("a file");
    let config: Value = serde_json::from_slice(&config).expect("JSON");
    assert_eq!((&config["base_model_name_or_path"], &config["revision"]), (&json!(ID), &json!(COMMIT)));
}

/// Every file below a folder.
fn walk(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path());
    entries.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}

fn write_files(folder: &Path, files: &Files) {
    for (name, bytes) in files {
        let path = folder.join(name);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        std::fs::write(path, bytes).expect("a file");
    }
}

#[test]
fn what_the_hub_refuses_says_what_to_do() {
    let (hub, folder) = (TestHub::new(MODEL.clone()), tempfile::tempdir().expect("a folder"));
    let folder = folder.path();
    for (status, parts) in [
        (401, &["401 Unauthorized", "licence", "HF_TOKEN"][..]),
        (403, &["403 Forbidden", "licence", "HF_TOKEN"]),
        (404, &["404 Not Found", "check the name and the revision"]),
        (429, &["429", "wait"]),
        (503, &["503", "again later"]),
    ] {
        hub.behave(Behaviour { refuse: Some(status), ..Behaviour::default() });
        let output = hub.plan(folder, &[]);
        refused(&output, 3, parts);
        refused(&output, 3, &["base.path", "repository: tiny/world", "revision: main", "there is none"]);
    }
    hub.behave(Behaviour::default());
    refused(&hub.plan(folder, &["--set", "base.revision=v2"]), 3, &["404 Not Found", "revision: v2"]);
    refused(&hub.plan(folder, &["--offline"]), 3, &["not in the cache", "--offline", ID]);
    // A revision may have slashes.
    plan_of(&hub.plan(folder, &["--set", "base.revision=refs/pr/1"]));
    assert_eq!(std::fs::read_to_string(cached(folder).join("refs/refs/pr/1")).expect("a file"), COMMIT);
    // Nobody listens there.
    let mut command = hub.with(folder, titer());
    command.env("HF_ENDPOINT", "http://127.0.0.1:9").args([
        "generate",
        "--prompt",
        "a",
        "--model",
        "hf://tiny/other@v1",
    ]);
    refused(
        &command.output().expect("it runs"),
        3,
        &["127.0.0.1:9", "tiny/other", "revision: v1", "--offline", "cause: "],
    );
    // A token that is none.
    let mut command = hub.with(folder, titer());
    command.env("HF_TOKEN", format!("{TOKEN}\nX: y")).args(["generate", "--prompt", "a", "--model", ID]);
    let output = command.output().expect("it runs");
    refused(&output, 2, &["characters that no token has"]);
    assert!(!told(&output).contains(TOKEN));
}

#[test]
fn a_token_file_counts_where_no_variable_is_set() {
    let (hub, folder) = (TestHub::new(MODEL.clone()), tempfile::tempdir().expect("a folder"));
    std::fs::create_dir(folder.path().join("hf")).expect("a folder");
    std::fs::write(folder.path().join("hf/token"), format!("{TOKEN}\n")).expect("a file");
    plan_of(&hub.plan(folder.path(), &[]));
    let asked = hub.asked();
    assert_eq!(asked[0].headers["authorization"], format!("Bearer {TOKEN}"));
}

#[test]
fn a_download_that_broke_off_is_resumed() {
    let (hub, folder) = (TestHub::new(MODEL.clone()), tempfile::tempdir().expect("a folder"));
    let (folder, weights) = (folder.path(), &MODEL[WEIGHTS]);
    hub.behave(Behaviour { cut: Some(1000), ..Behaviour::default() });
    let size = weights.len().to_string();
    refused(&hub.plan(folder, &[]), 3, &["model.safetensors", "ended after 1000 of", &size, "goes on", ID]);
    assert_eq!(incomplete(folder), weights[..1000]);
    assert!(!snapshot(folder).join(WEIGHTS).exists());
    refused(&hub.plan(folder, &["--offline"]), 3, &["--offline"]);

    hub.asked();
    hub.behave(Behaviour { cut: Some(500), ..Behaviour::default() });
    refused(&hub.plan(folder, &[]), 3, &["ended after 1500 of"]);
    let asked = hub.asked();
    let ranges: Vec<_> =
        asked.iter().filter(|request| !request.hub).map(|request| request.headers["range"].as_str()).collect();
    assert_eq!(ranges, ["bytes=1000-"]);
    plan_of(&hub.plan(folder, &[]));
    assert_eq!(&std::fs::read(snapshot(folder).join(WEIGHTS)).expect("a file"), weights);

    // A server without ranges starts anew.
    let other = tempfile::tempdir().expect("a folder");
    hub.behave(Behaviour { cut: Some(1000), ..Behaviour::default() });
    refused(&hub.plan(other.path(), &[]), 3, &["ended after 1000 of"]);
    hub.behave(Behaviour { whole: true, ..Behaviour::default() });
    plan_of(&hub.plan(other.path(), &[]));
    assert_eq!(&std::fs::read(snapshot(other.path()).join(WEIGHTS)).expect("a file"), weights);
}

#[test]
fn servers_that_lie_or_hang_are_noticed() {
    let (hub, folder) = (TestHub::new(MODEL.clone()), tempfile::tempdir().expect("a folder"));
    let folder = folder.path();
    hub.behave(Behaviour { longer: true, ..Behaviour::default() });
    refused(&hub.plan(folder, &[]), 3, &["longer than the", "announced"]);
    assert!(incomplete(folder).is_empty());
    hub.behave(Behaviour { siblings: vec!["../../../evil.safetensors"], ..Behaviour::default() });
    let other = tempfile::tempdir().expect("a folder");
    refused(&hub.plan(other.path(), &[]), 3, &["outside of it", "../../../evil"]);
    assert!(!cached(other.path()).exists());
    hub.behave(Behaviour { silent: true, ..Behaviour::default() });
    let mut command = hub.with(folder, titer());
    command
        .env("HF_HUB_DOWNLOAD_TIMEOUT", "1")
        .arg("plan")
        .arg(experiment(folder))
        .arg("--store")
        .arg(folder.join("store"));
    refused(&command.output().expect("it runs"), 3, &["ended after 0 of", "imeout"]);
    // Answers that are not the hub's.
    let mut broken = MODEL.clone();
    broken.remove(WEIGHTS);
    let pickled = TestHub::new(broken.clone());
    pickled.behave(Behaviour { siblings: vec!["pytorch_model.bin"], ..Behaviour::default() });
    let output = pickled.plan(other.path(), &[]);
    refused(&output, 3, &["`pytorch_model.bin`, which can run code"]);
    broken.insert(
        "model.safetensors.index.json".into(),
        br#"{ "weight_map": { "a": "../../../../a.safetensors" } }"#.to_vec(),
    );
    refused(&TestHub::new(broken.clone()).plan(other.path(), &[]), 3, &["../../../../a.safetensors"]);
}

#[test]
fn shards_are_those_of_the_index() {
    let mut files = MODEL.clone();
    let weights = files.remove(WEIGHTS).expect("weights");
    let shard = "model-00001-of-00001.safetensors";
    files.insert(shard.into(), weights);
    files.insert(
        "model.safetensors.index.json".into(),
        json!({ "weight_map": { "a": shard } }).to_string().into_bytes(),
    );
    let (hub, folder) = (TestHub::new(files.clone()), tempfile::tempdir().expect("a folder"));
    let plan = plan_of(&hub.plan(folder.path(), &[]));
    assert_eq!(plan["stages"][0]["spec"]["hub"]["files"], json!(files.keys().collect::<Vec<_>>()));
    assert!(snapshot(folder.path()).join(shard).is_file());
}

#[test]
fn two_processes_download_a_model_once() {
    let (hub, folder) = (TestHub::new(MODEL.clone()), tempfile::tempdir().expect("a folder"));
    let folder = folder.path();
    let config = experiment(folder);
    let plan = || {
        let mut command = hub.with(folder, titer());
        command.arg("plan").arg(&config).arg("--json").arg("--store").arg(folder.join("store"));
        plan_of(&command.output().expect("it runs"))
    };
    std::thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(plan))));
    let asked = hub.asked();
    assert_eq!(asked.iter().filter(|request| !request.hub).count(), 1, "{asked:#?}");
    assert_eq!(std::fs::read(snapshot(folder).join(WEIGHTS)).expect("a file"), MODEL[WEIGHTS]);
}

#[test]
fn a_folder_may_stand_in_for_the_hub() {
    let (hub, folder) = (TestHub::new(MODEL.clone()), tempfile::tempdir().expect("a folder"));
    let folder = folder.path();
    let mirror = folder.join("mirror");
    write_files(&mirror.join(ID), &MODEL);
    let plan = |folder: &Path, endpoint: &str| {
        let mut command = hub.with(folder, titer());
        command.arg("plan").arg(experiment(folder)).arg("--json").arg("--store").arg(folder.join("store"));
        command.env("HF_ENDPOINT", endpoint).output().expect("it runs")
    };
    let endpoint = format!("file://{}", mirror.display());
    let planned = plan_of(&plan(folder, &endpoint));
    let spec = &planned["stages"][0]["spec"];
    assert_eq!(spec["path"], json!(mirror.join(ID)));
    assert_eq!(spec["hub"]["repository"], ID);
    assert!(!folder.join("hf").exists() && hub.asked().is_empty());
    assert_eq!(keys(&planned), keys(&plan_of(&hub.plan(folder, &[]))), "the same content");
    refused(&plan(folder, "file:///nowhere"), 3, &["no such repository", "/nowhere/tiny/world"]);
    refused(&plan(folder, "nowhere"), 2, &["HF_ENDPOINT"]);
}

#[test]
fn only_a_model_of_the_hub_has_a_revision() {
    let (hub, folder) = (TestHub::new(MODEL.clone()), tempfile::tempdir().expect("a folder"));
    let folder = folder.path();
    write_files(&folder.join("copy"), &MODEL);
    let set = |path: &str| hub.plan(folder, &["--set", &format!("base.path={path}"), "--set", "base.revision=main"]);
    refused(&set(&folder.join("copy").display().to_string()), 2, &["only a model of the hub", "base.revision"]);
    refused(&set("hf://tiny/world@main"), 2, &["given twice", "base.revision"]);
    let output = hub.plan(folder, &["--set", "base.revision=../main"]);
    refused(&output, 2, &["is no revision", "base.revision"]);
    refused(&hub.plan(folder, &["--set", "base.path=hf://tiny"]), 2, &["hf://owner/name", "base.path"]);
    let config = small(folder, &[("[base]", "[base]\nrevision = \"main\"")]);
    let output = hub.with(folder, titer()).arg("plan").arg(config).output().expect("it runs");
    refused(&output, 2, &["only a model of the hub", "base.revision"]);
    assert!(hub.asked().is_empty());
    // A folder goes before a name.
    write_files(&folder.join(ID), &MODEL);
    assert!(plan_of(&hub.plan(folder, &[]))["stages"][0]["spec"]["hub"].is_null());
    assert!(hub.asked().is_empty());
    // And a mistake elsewhere before a long download.
    std::fs::remove_dir_all(folder.join(ID)).expect("gone");
    refused(&hub.plan(folder, &["--set", "align.train.batch_size=0"]), 2, &["align.train.batch_size"]);
    assert!(!snapshot(folder).join(WEIGHTS).exists());
}
