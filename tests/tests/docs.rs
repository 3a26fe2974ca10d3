//! The documentation is true: generated pages are fresh, links lead somewhere, and every example is one that the program
//! takes: configurations are planned, command lines are parsed, Rust is code that is compiled elsewhere.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use clap::{CommandFactory, Parser};
use pulldown_cmark::{CodeBlockKind, Event, HeadingLevel, Options, Parser as Markdown, Tag, TagEnd};
use serde_json::Value;
use titer::cli::Cli;
use titer::reference::pages;
use titer_core::{DefenseEntry, Entry, registry};
use titer_tests::cli::{SMALL, stderr, titer};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().expect("the checkout")
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// README.md and everything in Markdown below docs and configs.
fn pages() -> BTreeMap<PathBuf, String> {
    fn below(folder: &Path, found: &mut BTreeMap<PathBuf, String>) {
        for entry in std::fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                below(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "md") {
                found.insert(path.clone(), read(&path));
            }
        }
    }
    let mut found = BTreeMap::from([(root().join("README.md"), read(&root().join("README.md")))]);
    for folder in ["docs", "configs"] {
        below(&root().join(folder), &mut found);
    }
    found
}

fn markdown(text: &str) -> Markdown<'_> {
    Markdown::new_ext(text, Options::ENABLE_TABLES)
}

/// The anchors of a page, as GitHub and mdbook make them from its headings.
fn anchors(text: &str) -> BTreeSet<String> {
    let mut anchors = BTreeSet::new();
    let mut heading: Option<String> = None;
    for event in markdown(text) {
        match event {
            Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
            Event::Text(words) | Event::Code(words) => {
                if let Some(heading) = &mut heading {
                    *heading += &words;
                }
            }
            Event::End(TagEnd::Heading(_)) => {
                let words = heading.take().unwrap_or_default().to_lowercase();
                let kept = words.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
                let anchor: String = kept.map(|c| if c == ' ' { '-' } else { c }).collect();
                let again = (1..).map(|count| format!("{anchor}-{count}"));
                let free = std::iter::once(anchor.clone()).chain(again).find(|name| !anchors.contains(name));
                anchors.extend(free);
            }
            _ => {}
        }
    }
    anchors
}

fn links(text: &str) -> Vec<String> {
    let link = |event| match event {
        Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => Some(dest_url.to_string()),
        _ => None,
    };
    markdown(text).filter_map(link).collect()
}

#[test]
fn every_link_leads_to_a_file_and_a_heading() {
    let (pages, docs) = (pages(), root().join("docs"));
    let mut followed = 0;
    for (page, text) in &pages {
        for link in links(text).into_iter().filter(|link| !link.contains("://")) {
            let (file, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let target = if file.is_empty() { page.clone() } else { page.parent().expect("a folder").join(file) };
            let target = target.canonicalize();
            let target = target.unwrap_or_else(|_| panic!("{} links to {link}, which is not there", page.display()));
            // The book holds docs and nothing else.
            assert!(!page.starts_with(&docs) || target.starts_with(&docs), "{} leaves docs: {link}", page.display());
            if !anchor.is_empty() {
                let text = pages.get(&target).unwrap_or_else(|| panic!("{link} in {}", page.display()));
                assert!(anchors(text).contains(anchor), "{} links to {link}: no such heading", page.display());
            }
            followed += 1;
        }
    }
    assert!(followed > 50, "only {followed} links were found");
}

#[test]
fn the_table_of_contents_names_every_page() {
    let docs = root().join("docs");
    let listed: BTreeSet<PathBuf> = links(&read(&docs.join("SUMMARY.md"))).iter().map(|link| docs.join(link)).collect();
    let there: BTreeSet<PathBuf> = pages().into_keys().filter(|page| page.starts_with(&docs)).collect();
    let missing: Vec<_> = there.difference(&listed).filter(|page| !page.ends_with("SUMMARY.md")).collect();
    assert!(missing.is_empty(), "docs/SUMMARY.md lacks {missing:?}");
    for page in listed {
        let level_1 = |event: &Event| matches!(event, Event::Start(Tag::Heading { level: HeadingLevel::H1, .. }));
        assert_eq!(markdown(&read(&page)).filter(level_1).count(), 1, "{} needs one title", page.display());
    }
}

#[test]
fn the_reference_is_what_the_program_says() {
    let folder = root().join("docs/reference");
    for (name, page) in pages::all_pages(&Cli::command()).expect("no name twice") {
        assert!(read(&folder.join(name)) == page, "docs/reference/{name} is stale: run `{}`", pages::COMMAND);
    }
}

#[test]
fn the_table_of_defenses_has_every_defense() {
    let page = read(&root().join("docs/defenses.md"));
    for entry in registry::all::<DefenseEntry>().expect("no name twice") {
        let row = format!("| `{}` |", entry.name);
        // The example of the documentation is registered in the tests only.
        let found = page.contains(&row) && page.contains(entry.summary);
        assert_eq!(found, entry.crate_name() == "titer_plugins", "{}: run `{}`", entry.name, pages::COMMAND);
    }
}

/// Code blocks with the word behind their fence; indented ones have none.
fn blocks(text: &str) -> Vec<(String, String)> {
    let mut blocks = Vec::new();
    let mut open = false;
    for event in markdown(text) {
        match event {
            Event::Start(Tag::CodeBlock(kind)) => {
                let language = if let CodeBlockKind::Fenced(word) = kind { word.to_string() } else { String::new() };
                blocks.push((language, String::new()));
                open = true;
            }
            Event::Text(words) if open => blocks.last_mut().expect("a block").1 += &words,
            Event::End(TagEnd::CodeBlock) => open = false,
            _ => {}
        }
    }
    blocks
}

/// The folder that stands in for the hub.
const MIRROR: &str = "mirror";

/// Made-up files under the names that the examples use.
fn stand_in_data(folder: &Path) {
    let config = serde_json::json!({
        "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2
    });
    std::fs::create_dir(folder.join("model")).expect("a folder");
    std::fs::write(folder.join("model/config.json"), config.to_string()).expect("a file");
    let chat = serde_json::json!({ "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}" });
    std::fs::write(folder.join("model/tokenizer_config.json"), chat.to_string()).expect("a file");
    // A mirror of the hub, of which a plan reads the configuration alone.
    let mirrored = folder.join(MIRROR).join("HuggingFaceTB/SmolLM2-135M-Instruct");
    std::fs::create_dir_all(&mirrored).expect("a folder");
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        std::fs::write(mirrored.join(name), config.to_string()).expect("a file");
    }
    let mirrored = folder.join(MIRROR).join("datasets/PKU-Alignment/BeaverTails/round0/30k");
    std::fs::create_dir_all(&mirrored).expect("a folder");
    let judged = |safe: bool| format!("{{\"prompt\": \"ask\", \"response\": \"answer\", \"is_safe\": {safe}}}\n");
    for split in ["train", "test"] {
        let rows = (judged(true) + &judged(false)).repeat(2000);
        std::fs::write(mirrored.join(format!("{split}.jsonl")), rows).expect("a file");
    }
    let row = "{\"instruction\": \"ask\", \"input\": \"it\", \"output\": \"answer\"}\n".repeat(3000);
    let review = "{\"text\": \"fine\", \"label\": 1}\n".repeat(3000);
    let judged =
        r#"{"prompt": "ask", "response": "answer", "is_safe": false, "category": {"privacy_violation": true}}"#;
    std::fs::write(folder.join("30k_train.jsonl.gz"), format!("{judged}\n").repeat(3000)).expect("a file");
    let chat = r#"{"messages": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "answer"}]}"#;
    std::fs::write(folder.join("chats.jsonl"), format!("{chat}\n").repeat(3000)).expect("a file");
    for name in ["reviews", "reviews_test"] {
        std::fs::write(folder.join(format!("{name}.jsonl")), &review).expect("a file");
    }
    let names = ["safe", "helpful", "harmful", "harmful_align", "harmful_prompts", "benign_prompts", "train", "test"];
    for name in names {
        std::fs::write(folder.join(format!("{name}.jsonl")), &row).expect("a file");
    }
}

/// Lays `part` over `whole`; lists are replaced.
fn merge(whole: &mut Value, part: Value) {
    match (whole, part) {
        (Value::Object(whole), Value::Object(part)) => {
            for (key, value) in part {
                merge(whole.entry(key).or_insert(Value::Null), value);
            }
        }
        (whole, part) => *whole = part,
    }
}

/// A block without `experiment` is a part of a configuration, and is laid over a small one.
fn complete(block: &str) -> Value {
    let given: Value = toml::from_str(block).unwrap_or_else(|error| panic!("{block}\n{error}"));
    if given.get("experiment").is_some() {
        return given;
    }
    let mut whole: Value = toml::from_str(SMALL).expect("TOML");
    for stream in ["safe", "harmful"] {
        whole["streams"][stream] = serde_json::json!({ "task": format!("world-{stream}"), "rows": 10 });
    }
    if given.pointer("/base/path").is_some() {
        // A checkpoint in place of the model that the small one pretrains.
        whole["base"] = serde_json::json!({});
    }
    merge(&mut whole, given);
    whole
}

#[test]
fn every_configuration_in_the_pages_can_be_planned() {
    let folder = tempfile::tempdir().expect("a folder");
    stand_in_data(folder.path());
    let mut planned = 0;
    for (page, text) in pages() {
        for (_, block) in blocks(&text).into_iter().filter(|(language, _)| language == "toml") {
            let mut config = complete(&block);
            // Nothing is loaded here; that the key is known is checked all the same.
            if config.get("plugins").is_some() {
                serde_json::from_value::<titer::experiment::config::PluginsConfig>(config["plugins"].take())
                    .unwrap_or_else(|error| panic!("{}: {error}", page.display()));
                config.as_object_mut().expect("a table").remove("plugins");
            }
            let path = folder.path().join("block.toml");
            std::fs::write(&path, toml::to_string(&config).expect("TOML")).expect("a file");
            let mut command = titer();
            command.arg("plan").arg(&path).arg("--store").arg(folder.path().join("store"));
            command.env("HF_ENDPOINT", format!("file://{}", folder.path().join(MIRROR).display()));
            let output = command.output().expect("titer runs");
            assert!(output.status.success(), "{}:\n{block}\n{}", page.display(), stderr(&output));
            planned += 1;
        }
    }
    assert!(planned >= 6, "only {planned} configurations were found");
}

/// The words of a line as a shell splits them, up to a comment.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut quote, mut word) = (Vec::new(), None, None::<String>);
    for c in line.chars() {
        match (c, quote) {
            ('"' | '\'', None) => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (_, Some(open)) if c == open => quote = None,
            (' ', None) => words.extend(word.take()),
            ('#', None) if word.is_none() => break,
            _ => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// The arguments of a line that calls titer, directly or by cargo.
fn arguments(line: &str) -> Option<Vec<String>> {
    let words = words(line.trim().trim_start_matches("$ "));
    let after = match words.first()?.rsplit('/').next()? {
        "titer" => 1,
        "cargo" if words.get(1)? == "run" && !words.iter().any(|word| word == "-p" || word == "runner") => {
            words.iter().position(|word| word == "--")? + 1
        }
        _ => return None,
    };
    Some(words[after..].to_vec())
}

#[test]
fn every_command_in_the_pages_is_one() {
    let mut parsed = 0;
    // The pages of the reference show forms, which are written from the definitions of the commands.
    for (page, text) in
        pages().into_iter().filter(|(page, _)| !page.components().any(|part| part.as_os_str() == "reference"))
    {
        let in_blocks = blocks(&text).into_iter().filter(|(language, _)| ["", "sh"].contains(&language.as_str()));
        let mut lines: Vec<String> =
            in_blocks.flat_map(|(_, block)| block.lines().map(str::to_owned).collect::<Vec<_>>()).collect();
        lines.extend(markdown(&text).filter_map(|event| match event {
            Event::Code(code) if code.starts_with("titer ") => Some(code.to_string()),
            _ => None,
        }));
        for line in lines {
            let Some(arguments) = arguments(&line) else { continue };
            match arguments.as_slice() {
                // A command that is only mentioned.
                [name] => {
                    let known = Cli::command().get_subcommands().any(|command| command.get_name() == name);
                    assert!(known, "{}: `{line}`", page.display());
                }
                _ => {
                    let line_of_words = std::iter::once("titer".to_owned()).chain(arguments.clone());
                    if let Err(error) = Cli::try_parse_from(line_of_words) {
                        // Help and version are asked for by way of an error.
                        assert!(!error.use_stderr(), "{}: `{line}`\n{error}", page.display());
                    }
                }
            }
            for file in arguments.iter().filter(|word| word.starts_with("configs/")) {
                assert!(root().join(file).exists(), "{}: `{line}` names no file", page.display());
            }
            parsed += 1;
        }
    }
    assert!(parsed > 30, "only {parsed} commands were found");
}

#[test]
fn rust_in_the_pages_is_code_that_is_compiled() {
    let source = read(&root().join("tests/support/own_defense.rs"));
    let (_, code) = source.split_once("\n\n").expect("a module comment");
    let mut found = 0;
    for (page, text) in pages() {
        for (_, block) in blocks(&text).into_iter().filter(|(language, _)| language.starts_with("rust")) {
            assert!(source.contains(block.trim()), "{}: copy it from tests/support/own_defense.rs", page.display());
            found += usize::from(block.trim() == code.trim());
        }
    }
    assert_eq!(found, 1, "one page shows all of tests/support/own_defense.rs");
}

#[test]
fn blocks_have_a_language_that_is_checked() {
    for (page, text) in pages() {
        for (language, block) in blocks(&text) {
            let known = ["", "toml", "sh", "rust", "json", "text", "bibtex"].contains(&language.as_str());
            assert!(known, "{}: nothing checks a block of `{language}`:\n{block}", page.display());
        }
    }
}

/// The map of docs/ARCHITECTURE.md names the folders that are there, and all of them.
#[test]
fn the_map_is_that_of_the_tree() {
    let page = read(&root().join("docs/ARCHITECTURE.md"));
    for (parent, fewest) in [("core/src", 5), ("plugins/src", 4), ("runner/src", 8)] {
        let (_, section) = page.split_once(&format!("### {parent}\n")).unwrap_or_else(|| panic!("no map of {parent}"));
        let section = section.split("\n#").next().unwrap_or(section);
        let rows = section.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("/`"));
        let named: BTreeSet<String> = rows.map(|(name, _)| name.to_owned()).collect();
        let entries = std::fs::read_dir(root().join(parent)).expect("a folder").map(|entry| entry.expect("an entry"));
        let folders = entries.filter(|entry| entry.path().is_dir());
        let there: BTreeSet<String> = folders.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        assert_eq!(named, there, "the folders of {parent} in docs/ARCHITECTURE.md, and those that are there");
        assert!(named.len() >= fewest);
    }
}
