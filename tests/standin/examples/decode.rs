//! Decodes every kernel of PTX files and lists the instructions that the stand-in does not know.
//!
//!     cargo run --release --example decode -- FILE.ptx …

use std::collections::BTreeMap;

use cuda_standin::decode::decode;
use cuda_standin::ptx::Module;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for path in std::env::args().skip(1) {
        let module = Module::parse(&std::fs::read_to_string(&path)?)?;
        let mut unknown = BTreeMap::<String, Vec<&str>>::new();
        for (name, entry) in &module.entries {
            for (text, why) in decode(&module, name, entry)?.unknown {
                unknown.entry(format!("{why}: for instance `{text}`")).or_default().push(name);
            }
        }
        println!("{path}: {} kernels for {}, PTX {:?}", module.entries.len(), module.target, module.version);
        for (what, kernels) in unknown {
            println!("  {what} ({} times, first in {})", kernels.len(), kernels[0]);
        }
    }
    Ok(())
}
