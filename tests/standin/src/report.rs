//! What was asked of the device and what was wrong with it, counted.

use std::collections::BTreeMap;
use std::fmt::Write;

/// Counts since the start or since the last reset.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    pub calls: BTreeMap<String, u64>,
    pub kernels: BTreeMap<String, u64>,
    /// Products by the function that was called.
    pub products: BTreeMap<String, u64>,
    /// Products of which an operand is not aligned to 16 bytes.
    pub unaligned_products: u64,
    pub allocations: u64,
    pub frees: u64,
    /// How often the host waited for work of the device.
    pub waits: u64,
    pub bytes_up: u64,
    pub bytes_down: u64,
    pub instructions: u64,
    /// What was wrong, and how often.
    pub findings: BTreeMap<String, u64>,
}

/// What the memory says at the time of a report.
#[derive(Clone, Copy, Debug, Default)]
pub struct MemoryCounts {
    pub peak: usize,
    pub in_use: usize,
    /// Allocations that are alive, and their bytes.
    pub alive: (usize, usize),
}

/// Counts one more.
pub fn count(map: &mut BTreeMap<String, u64>, name: &str) {
    match map.get_mut(name) {
        Some(count) => *count += 1,
        None => _ = map.insert(name.to_owned(), 1),
    }
}

impl Counts {
    /// As JSON: an object of numbers, and of objects of numbers by name.
    pub fn json(&self, memory: &MemoryCounts) -> String {
        let mut text = String::from("{\n");
        let sum = |map: &BTreeMap<String, u64>| map.values().sum::<u64>();
        let numbers = [
            ("kernels", sum(&self.kernels)),
            ("products", sum(&self.products)),
            ("unaligned_products", self.unaligned_products),
            ("allocations", self.allocations),
            ("frees", self.frees),
            ("waits", self.waits),
            ("bytes_up", self.bytes_up),
            ("bytes_down", self.bytes_down),
            ("instructions", self.instructions),
            ("peak_bytes", memory.peak as u64),
            ("bytes_in_use", memory.in_use as u64),
            ("alive_allocations", memory.alive.0 as u64),
            ("alive_bytes", memory.alive.1 as u64),
            ("findings", sum(&self.findings)),
        ];
        for (name, number) in numbers {
            _ = writeln!(text, "  \"{name}\": {number},");
        }
        let maps = [
            ("kernels_by_name", &self.kernels),
            ("products_by_name", &self.products),
            ("calls_by_name", &self.calls),
            ("findings_by_text", &self.findings),
        ];
        for (n, (name, map)) in maps.iter().enumerate() {
            let lines: Vec<String> =
                map.iter().map(|(key, count)| format!("    \"{}\": {count}", escaped(key))).collect();
            let end = if n + 1 < maps.len() { "," } else { "" };
            let body = if lines.is_empty() { String::new() } else { format!("\n{}\n  ", lines.join(",\n")) };
            _ = writeln!(text, "  \"{name}\": {{{body}}}{end}");
        }
        text + "}\n"
    }
}

fn escaped(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            '\n' => out.push_str("\\n"),
            c if u32::from(c) < 32 => _ = write!(out, "\\u{:04x}", u32::from(c)),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_json() {
        let mut counts = Counts { bytes_up: 7, ..Counts::default() };
        count(&mut counts.kernels, "norm");
        count(&mut counts.kernels, "norm");
        count(&mut counts.findings, "a \"quoted\"\nline");
        let json = counts.json(&MemoryCounts { peak: 3, ..MemoryCounts::default() });
        for part in [
            "\"kernels\": 2,",
            "\"bytes_up\": 7,",
            "\"peak_bytes\": 3,",
            "\"findings\": 1,",
            "\"calls_by_name\": {},",
            "\"kernels_by_name\": {\n    \"norm\": 2\n  },",
            "\"a \\\"quoted\\\"\\nline\": 1\n  }\n}\n",
        ] {
            assert!(json.contains(part), "{part} in {json}");
        }
    }
}
