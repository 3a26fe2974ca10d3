//! What the environment asks of the stand-in. It is read once, when the program first calls.

use std::fmt;
use std::path::PathBuf;

use crate::vm::Dropped;

/// A defect that is planted into the program under test.
#[derive(Clone, Debug, PartialEq)]
pub enum Plant {
    /// Two parameters of a kernel change places.
    Swap { kernel: String, first: usize, second: usize },
    /// The buffer of a parameter is freed before the launch.
    Free { kernel: String, param: usize },
    /// A number is added to a parameter.
    Add { kernel: String, param: usize, number: i64 },
    /// So many blocks more or less.
    Grid { kernel: String, by: i64 },
    /// Another number of threads in a block.
    Block { kernel: String, threads: u32 },
    /// The buffer of a parameter ends so many bytes sooner.
    Shrink { kernel: String, param: usize, bytes: usize },
    /// Every product of matrices adds to what was there.
    Beta(f32),
    /// Threads do not wait for each other.
    Barrier { kernel: String },
    /// The device is lost at the launch, unless the file is there: it is made then, so that only one process loses it.
    Lose { kernel: String, file: PathBuf },
}

impl Plant {
    fn parse(text: &str) -> Option<Plant> {
        let words: Vec<&str> = text.split_whitespace().collect();
        Some(match words[..] {
            ["swap", kernel, i, j] => {
                Plant::Swap { kernel: kernel.into(), first: i.parse().ok()?, second: j.parse().ok()? }
            }
            ["free", kernel, i] => Plant::Free { kernel: kernel.into(), param: i.parse().ok()? },
            ["add", kernel, i, n] => {
                Plant::Add { kernel: kernel.into(), param: i.parse().ok()?, number: n.parse().ok()? }
            }
            ["grid", kernel, by] => Plant::Grid { kernel: kernel.into(), by: by.parse().ok()? },
            ["block", kernel, n] => Plant::Block { kernel: kernel.into(), threads: n.parse().ok()? },
            ["shrink", kernel, i, n] => {
                Plant::Shrink { kernel: kernel.into(), param: i.parse().ok()?, bytes: n.parse().ok()? }
            }
            ["beta", value] => Plant::Beta(value.parse().ok()?),
            ["barrier", kernel] => Plant::Barrier { kernel: kernel.into() },
            ["lose", kernel, file] => Plant::Lose { kernel: kernel.into(), file: file.into() },
            _ => return None,
        })
    }

    fn kernel(&self) -> Option<&str> {
        match self {
            Plant::Swap { kernel, .. }
            | Plant::Free { kernel, .. }
            | Plant::Add { kernel, .. }
            | Plant::Grid { kernel, .. }
            | Plant::Block { kernel, .. }
            | Plant::Shrink { kernel, .. }
            | Plant::Barrier { kernel }
            | Plant::Lose { kernel, .. } => Some(kernel),
            Plant::Beta(_) => None,
        }
    }

    /// Whether the defect is for a kernel: the names agree up to the end of the shorter description, types left out or not.
    pub fn is_for(&self, kernel: &str) -> bool {
        let Some(name) = self.kernel() else { return false };
        let bare = name.strip_suffix("_f32").or(name.strip_suffix("_bf16")).unwrap_or(name);
        kernel.starts_with(name) || kernel == bare
    }
}

impl fmt::Display for Plant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

#[derive(Clone, Debug)]
pub struct Settings {
    /// Where the summary goes at exit; `-` is the standard error.
    pub summary: Option<PathBuf>,
    pub strict: bool,
    /// Whether memory that is alive at exit is a finding.
    pub leaks: bool,
    /// The compute capability in tenths.
    pub capability: u32,
    /// The driver's version: 12080 is 12.8.
    pub driver: u32,
    pub devices: u32,
    pub memory: usize,
    /// A file that a process locks as long as it has a context: the device serves one process at a time.
    pub exclusive: Option<PathBuf>,
    pub no_cublas: bool,
    pub eager: bool,
    pub dry: bool,
    pub backtrace: bool,
    pub dropped: Dropped,
    pub plant: Option<Plant>,
    /// Settings that could not be read.
    pub wrong: Vec<String>,
}

impl Settings {
    #[expect(clippy::disallowed_methods, reason = "the one place")]
    pub fn from_environment() -> Settings {
        Settings::new(|name| std::env::var(name).ok())
    }

    /// Settings by their names, for instance `STANDIN_CC`.
    pub fn new(get: impl Fn(&str) -> Option<String>) -> Settings {
        let mut wrong = Vec::new();
        let mut number = |name: &str, usual: usize| {
            let Some(text) = get(name) else { return usual };
            // A capability may be written with its dot.
            text.replace('.', "").parse().unwrap_or_else(|_| {
                wrong.push(format!("{name}={text} is no number"));
                usual
            })
        };
        let capability = number("STANDIN_CC", 90) as u32;
        let driver = number("STANDIN_DRIVER", 13000) as u32;
        let devices = number("STANDIN_DEVICES", 1) as u32;
        let memory = number("STANDIN_MEMORY", 8 << 30);
        let dropped = number("STANDIN_DROP_BARRIER", usize::MAX);
        let plant = get("STANDIN_PLANT").and_then(|text| {
            let plant = Plant::parse(&text);
            if plant.is_none() {
                wrong.push(format!("STANDIN_PLANT=`{text}` names no defect that can be planted"));
            }
            plant
        });
        let is_set = |name: &str| get(name).is_some_and(|value| !value.is_empty() && value != "0");
        Settings {
            summary: get("STANDIN_SUMMARY").map(PathBuf::from),
            strict: is_set("STANDIN_STRICT"),
            leaks: is_set("STANDIN_LEAKS"),
            capability,
            driver,
            devices,
            memory,
            exclusive: get("STANDIN_EXCLUSIVE").map(PathBuf::from),
            no_cublas: is_set("STANDIN_NO_CUBLAS"),
            eager: is_set("STANDIN_EAGER"),
            dry: is_set("STANDIN_DRY"),
            backtrace: is_set("STANDIN_BACKTRACE"),
            dropped: if dropped == usize::MAX { Dropped::None } else { Dropped::One(dropped as u32) },
            plant,
            wrong,
        }
    }

    /// The newest PTX that the driver reads.
    pub fn newest_ptx(&self) -> (u32, u32) {
        match self.driver {
            ..11080 => (7, 4),
            11080..12000 => (7, 8),
            12000..12060 => (8, self.driver % 1000 / 10),
            12060..13000 => (8, self.driver % 1000 / 10 - 1),
            _ => (9, self.driver % 1000 / 10),
        }
    }

    /// The most bytes of shared memory that a block may ask for.
    pub fn most_shared(&self) -> usize {
        match self.capability {
            90.. => 227 << 10,
            86 | 89 => 99 << 10,
            80.. => 163 << 10,
            _ => 64 << 10,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(pairs: &[(&str, &str)]) -> Settings {
        Settings::new(|name| pairs.iter().find(|pair| pair.0 == name).map(|pair| pair.1.to_owned()))
    }

    #[test]
    fn settings_are_read() {
        let usual = with(&[]);
        assert_eq!((usual.capability, usual.driver, usual.devices, usual.strict), (90, 13000, 1, false));
        let other =
            with(&[("STANDIN_CC", "8.6"), ("STANDIN_DRIVER", "12080"), ("STANDIN_STRICT", "1"), ("STANDIN_DRY", "0")]);
        assert_eq!((other.capability, other.strict, other.dry), (86, true, false));
        assert_eq!((other.newest_ptx(), other.most_shared()), ((8, 7), 99 << 10));
        assert_eq!(with(&[("STANDIN_DRIVER", "12000")]).newest_ptx(), (8, 0));
        assert_eq!(with(&[("STANDIN_DRIVER", "11080")]).newest_ptx(), (7, 8));
        assert_eq!(with(&[("STANDIN_CC", "new"), ("STANDIN_PLANT", "chaos")]).wrong.len(), 2);
    }

    #[test]
    fn defects_are_read_and_meant_for_kernels() {
        let plant = |text: &str| with(&[("STANDIN_PLANT", text)]).plant;
        assert_eq!(plant("add norm 3 -1"), Some(Plant::Add { kernel: "norm".into(), param: 3, number: -1 }));
        assert_eq!(plant("beta 1"), Some(Plant::Beta(1.0)));
        for text in ["swap k 1 2", "free k 1", "grid k -1", "block k 64", "shrink k 0 4", "barrier k", "lose k f"] {
            assert!(plant(text).is_some(), "{text}");
        }
        assert_eq!(plant("swap k 1"), None);
        let barrier = plant("barrier norm_f32").expect("a defect");
        assert!(barrier.is_for("norm_f32") && barrier.is_for("norm") && !barrier.is_for("norm_bf16"));
        let barrier = plant("barrier norm").expect("a defect");
        assert!(barrier.is_for("norm_f32") && barrier.is_for("norm_bf16") && !barrier.is_for("rms_norm"));
    }
}
