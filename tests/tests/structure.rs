//! The structure of the crates as it must stay: which module may import from which.
//!
//! Each crate has floors, lowest first. A floor is a folder of modules, or a module that is a file beside the crate's root. A
//! file may import from its own floor and from lower ones, so files of different floors never form a circle. Within a
//! floor, files do not form circles either; a folder's `mod.rs` counts as one with the files below it, which share its
//! private parts.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use syn::visit::{self, Visit};
use syn::{Attribute, Item, UseTree, Visibility};

/// The floors of each crate, lowest first.
const FLOORS: &[(&str, &[&str])] = &[
    (
        "core/kernels",
        &[
            "arithmetic",
            "encoding",
            "kernel",
            "matrix",
            "real",
            "simd",
            "reduce",
            "parallel",
            "portable",
            "widen",
            "low_precision",
            "rounded",
            "int8_vectors",
            "int8",
            "skinny",
            "amx",
            "gemm",
            "activation",
            "adamw",
            "attention",
            "cross_entropy",
            "dropout",
            "elementwise",
            "norm",
            "rope",
        ],
    ),
    (
        "core",
        &[
            "error",
            "bounds",
            "guard",
            "gguf",
            "rng",
            "event",
            "registry",
            "tensor",
            "weights",
            "device",
            "arithmetic",
            "optim",
            "nn",
            "data",
            "text",
            "model",
            "causal_lm",
            "task",
            "judge",
            "defense",
            "report",
            "testing",
        ],
    ),
    ("plugins", &["files", "scoring", "world", "models", "tasks", "judges", "defenses", "testing"]),
    (
        "runner",
        &[
            "names",
            "manifest",
            "memory",
            "environment",
            "logging",
            "driver",
            "interrupt",
            "disk",
            "inputs",
            "hub",
            "diagnostics",
            "model_folder",
            "plugins",
            "stats",
            "store",
            "experiment",
            "plan",
            "stage",
            "execute",
            "results",
            "report",
            "bench",
            "reference",
            "cli",
        ],
    ),
];

/// A module path within a crate, such as `plan::identity`; empty for the root.
type Module = String;

/// The modules of a crate with what each file says.
struct Crate {
    files: BTreeMap<Module, syn::File>,
}

impl Crate {
    /// All modules that are not for tests alone.
    fn read(root: &Path) -> Self {
        let mut files = BTreeMap::new();
        collect(String::new(), &root.join("lib.rs"), root, &mut files);
        Self { files }
    }

    /// The files that a module's file imports from.
    fn imports(&self, module: &str) -> BTreeSet<Module> {
        let mut named = Paths::default();
        named.visit_file(&self.files[module]);
        let paths = named.found.iter().filter_map(|path| self.absolute(module, path));
        let targets = paths.filter_map(|path| self.owner(&path, 0));
        targets.filter(|target| target != module).collect()
    }

    /// The module whose file defines what an absolute path names; re-exports are followed. `None` for the root, which holds
    /// re-exports and declarations only.
    fn owner(&self, path: &[String], depth: usize) -> Option<Module> {
        assert!(depth < 20, "re-exports of {path:?} go in a circle");
        let longest = (0..=path.len()).rev().find(|length| self.files.contains_key(&path[..*length].join("::")))?;
        let (module, rest) = (path[..longest].join("::"), &path[longest..]);
        if let Some(name) = rest.first()
            && let Some(target) = exports(&self.files[&module]).remove(name)
        {
            let target = self.absolute(&module, &target)?;
            return self.owner(&[&target[..], &rest[1..]].concat(), depth + 1);
        }
        Some(module).filter(|module| !module.is_empty())
    }

    /// A path from the root of the crate; `None` if it leads to another crate or names something local.
    fn absolute(&self, module: &str, path: &[String]) -> Option<Vec<String>> {
        let mut place: Vec<String> = module.split("::").filter(|part| !part.is_empty()).map(str::to_owned).collect();
        let mut rest = path;
        match rest.first()?.as_str() {
            "crate" => {
                place.clear();
                rest = &rest[1..];
            }
            "self" => rest = &rest[1..],
            "super" => {
                while rest.first().is_some_and(|part| part == "super") {
                    place.pop();
                    rest = &rest[1..];
                }
            }
            child if self.files.contains_key(&[&place[..], &[child.to_owned()]].concat().join("::")) => {}
            _ => return None,
        }
        place.extend_from_slice(rest);
        Some(place)
    }
}

/// Reads the file of a module and of all below it.
fn collect(module: Module, file: &Path, folder: &Path, files: &mut BTreeMap<Module, syn::File>) {
    let text = std::fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    let parsed = syn::parse_file(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    for item in &parsed.items {
        let Item::Mod(declared) = item else { continue };
        if declared.content.is_some() || for_tests(&declared.attrs) {
            continue;
        }
        let name = declared.ident.to_string();
        let below = if module.is_empty() { name.clone() } else { format!("{module}::{name}") };
        let (plain, nested) = (folder.join(format!("{name}.rs")), folder.join(&name).join("mod.rs"));
        let file = if plain.exists() { plain } else { nested };
        collect(below, &file, &folder.join(&name), files);
    }
    files.insert(module, parsed);
}

/// Whether an item is there in tests only.
fn for_tests(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let list = attribute.meta.require_list();
        attribute.path().is_ident("cfg") && list.is_ok_and(|list| list.tokens.to_string() == "test")
    })
}

/// What a file re-exports: the name and the path that it stands for.
fn exports(file: &syn::File) -> BTreeMap<String, Vec<String>> {
    let mut found = BTreeMap::new();
    for item in &file.items {
        if let Item::Use(item) = item
            && !matches!(item.vis, Visibility::Inherited)
        {
            leaves(&item.tree, &mut Vec::new(), &mut |path, name| drop(found.insert(name, path)));
        }
    }
    found
}

/// Every path of a `use` with the name that it is known by.
fn leaves(tree: &UseTree, prefix: &mut Vec<String>, found: &mut impl FnMut(Vec<String>, String)) {
    let below = |prefix: &[String], name: &dyn ToString| [prefix, &[name.to_string()]].concat();
    match tree {
        UseTree::Path(path) => {
            prefix.push(path.ident.to_string());
            leaves(&path.tree, prefix, found);
            prefix.pop();
        }
        UseTree::Name(name) if name.ident == "self" => {
            let last = prefix.last().cloned().unwrap_or_default();
            found(prefix.clone(), last);
        }
        UseTree::Name(name) => found(below(prefix, &name.ident), name.ident.to_string()),
        UseTree::Rename(name) => found(below(prefix, &name.ident), name.rename.to_string()),
        UseTree::Glob(_) => found(prefix.clone(), "*".into()),
        UseTree::Group(group) => group.items.iter().for_each(|tree| leaves(tree, prefix, found)),
    }
}

/// The paths that a file names, wherever it does.
#[derive(Default)]
struct Paths {
    found: Vec<Vec<String>>,
}

impl<'ast> Visit<'ast> for Paths {
    fn visit_item(&mut self, item: &'ast Item) {
        if let Item::Mod(module) = item
            && (for_tests(&module.attrs) || module.content.is_none())
        {
            return;
        }
        visit::visit_item(self, item);
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        leaves(&item.tree, &mut Vec::new(), &mut |path, _| self.found.push(path));
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        self.found.push(path.segments.iter().map(|segment| segment.ident.to_string()).collect());
        visit::visit_path(self, path);
    }
}

/// The types that a file defines and that a test does not.
#[derive(Default)]
struct Types {
    found: Vec<String>,
}

impl<'ast> Visit<'ast> for Types {
    fn visit_item(&mut self, item: &'ast Item) {
        match item {
            Item::Mod(module) if for_tests(&module.attrs) => return,
            Item::Struct(item) => self.found.push(item.ident.to_string()),
            Item::Enum(item) => self.found.push(item.ident.to_string()),
            Item::Trait(item) => self.found.push(item.ident.to_string()),
            Item::Type(item) => self.found.push(item.ident.to_string()),
            _ => {}
        }
        visit::visit_item(self, item);
    }
}

fn floor(module: &str) -> &str {
    module.split("::").next().unwrap_or(module)
}

/// A module and those below it that share its folder count as one: `a` and `a::b`.
fn related(one: &str, other: &str) -> bool {
    let within = |inner: &str, outer: &str| inner.strip_prefix(outer).is_some_and(|rest| rest.starts_with("::"));
    within(one, other) || within(other, one)
}

/// A circle among the modules, if there is one.
fn circle(graph: &BTreeMap<Module, BTreeSet<Module>>) -> Option<Vec<Module>> {
    fn walk(
        at: &str,
        graph: &BTreeMap<Module, BTreeSet<Module>>,
        path: &mut Vec<Module>,
        done: &mut BTreeSet<Module>,
    ) -> Option<Vec<Module>> {
        if let Some(start) = path.iter().position(|module| module == at) {
            return Some(path[start..].to_vec());
        }
        if done.contains(at) {
            return None;
        }
        path.push(at.to_owned());
        let found = graph.get(at).into_iter().flatten().find_map(|next| walk(next, graph, path, done));
        path.pop();
        done.insert(at.to_owned());
        found
    }
    let mut done = BTreeSet::new();
    graph.keys().find_map(|module| walk(module, graph, &mut Vec::new(), &mut done))
}

fn graph(name: &str) -> BTreeMap<Module, BTreeSet<Module>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name).join("src");
    let read = Crate::read(&root);
    let modules = read.files.keys().filter(|module| !module.is_empty());
    modules.map(|module| (module.clone(), read.imports(module))).collect()
}

#[test]
fn no_module_imports_from_a_higher_floor() {
    for (name, floors) in FLOORS {
        let level = |module: &str| floors.iter().position(|known| *known == floor(module));
        let graph = graph(name);
        for (module, imports) in &graph {
            let own = level(module).unwrap_or_else(|| panic!("{name}: `{}` has no place in FLOORS", floor(module)));
            for import in imports {
                let theirs = level(import).unwrap_or_else(|| panic!("{name}: `{import}` has no place in FLOORS"));
                assert!(theirs <= own, "{name}: `{module}` imports from `{import}`, which is on a higher floor");
            }
        }
        let found: BTreeSet<&str> = graph.keys().map(|module| floor(module)).collect();
        let gone: Vec<_> = floors.iter().filter(|floor| !found.contains(*floor)).collect();
        assert!(gone.is_empty(), "{name}: FLOORS names {gone:?}, which the crate does not have");
    }
}

/// A name that two types share is looked up twice by every reader. `Args` are the arguments of a command, one in each module
/// below `cli/commands`.
#[test]
fn no_two_types_share_a_name() {
    let mut named: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (name, _) in FLOORS {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name).join("src");
        for (module, file) in Crate::read(&root).files {
            let mut types = Types::default();
            types.visit_file(&file);
            types.found.into_iter().for_each(|found| named.entry(found).or_default().push(format!("{name} {module}")));
        }
    }
    assert!(named.len() > 200, "only {} types were found", named.len());
    named.retain(|name, places| places.len() > 1 && name != "Args");
    assert!(named.is_empty(), "{named:#?}");
}

#[test]
fn no_files_import_each_other_in_a_circle() {
    for (name, _) in FLOORS {
        let mut graph = graph(name);
        for (module, imports) in &mut graph {
            imports.retain(|import| !related(module, import));
        }
        assert_eq!(circle(&graph), None, "{name}");
    }
}

#[test]
fn circles_and_upward_imports_are_found() {
    let folder = tempfile::tempdir().expect("a folder");
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        std::fs::write(path, text).expect("a file");
    };
    write("lib.rs", "mod a; mod b; #[cfg(test)] mod tests; pub use b::inner::Thing;");
    write("a.rs", "fn f() -> crate::Thing { crate::b::g() }");
    write("b/mod.rs", "pub mod inner; pub fn g() { }");
    write("b/inner.rs", "use super::super::a; pub struct Thing; #[cfg(test)] mod tests { use crate::nowhere; }");
    write("tests.rs", "use crate::a;");
    let read = Crate::read(folder.path());
    let modules: Vec<&str> = read.files.keys().map(String::as_str).collect();
    assert_eq!(modules, ["", "a", "b", "b::inner"]);
    let imports = |module: &str| read.imports(module).into_iter().collect::<Vec<_>>();
    // A path is followed through the re-export to the file that defines it.
    assert_eq!(imports("a"), ["b", "b::inner"]);
    assert_eq!(imports("b::inner"), ["a"]);
    let modules = read.files.keys().filter(|module| !module.is_empty());
    let graph = modules.map(|module| (module.clone(), read.imports(module))).collect();
    assert_eq!(circle(&graph), Some(vec!["a".to_owned(), "b::inner".to_owned()]));
}
