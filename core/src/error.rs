//! One error type for core and plugins: a stable kind, a message, where it happened and what to do about it.

use std::fmt;
use std::path::Path;

/// The result of everything in `titer-core`.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, in few and stable classes. Each has one exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// A configuration, a setting or a name is wrong. Exit code 2.
    Config,
    /// A model or data file is missing, unreadable or malformed. Exit code 3.
    Data,
    /// The device cannot be used or cannot do what was asked. Exit code 4.
    Device,
    /// The computation itself failed: a non-finite loss, an operator error. Exit code 1.
    Run,
    /// The user asked to stop. Exit code 130.
    Interrupted,
}

impl Kind {
    /// The process exit code of this kind.
    pub const fn exit_code(self) -> u8 {
        match self {
            Kind::Run => 1,
            Kind::Config => 2,
            Kind::Data => 3,
            Kind::Device => 4,
            Kind::Interrupted => 130,
        }
    }
}

/// An error with its [`Kind`], the place it was found in and a remedy.
///
/// The message is a lower-case fragment without a full stop, with the offending value in backticks. `at` holds
/// pairs such as `("file", "data/x.json")` or `("key", "align.rho")`, outermost last.
pub struct Error {
    inner: Box<Inner>,
}

struct Inner {
    kind: Kind,
    message: String,
    at: Vec<(&'static str, String)>,
    help: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// The remedy where numbers are not finite.
    pub const DIVERGED: &'static str = "lower the learning rate, or the strength of the defense";

    /// Errors of the CUDA driver and of cuBLAS after which the process cannot use the device any more.
    const LOST: [&str; 11] = [
        "CUBLAS_STATUS_EXECUTION_FAILED",
        "CUDA_ERROR_LAUNCH_TIMEOUT",
        "CUDA_ERROR_INVALID_PC",
        "CUDA_ERROR_INVALID_ADDRESS_SPACE",
        "CUDA_ERROR_HARDWARE_STACK_ERROR",
        "CUDA_ERROR_ILLEGAL_ADDRESS",
        "CUDA_ERROR_ILLEGAL_INSTRUCTION",
        "CUDA_ERROR_MISALIGNED_ADDRESS",
        "CUDA_ERROR_LAUNCH_FAILED",
        "CUDA_ERROR_ASSERT",
        "CUDA_ERROR_ECC_UNCORRECTABLE",
    ];

    /// An error of `kind` that says `message`.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        let inner = Inner { kind, message: message.into(), at: Vec::new(), help: None, source: None };
        Self { inner: Box::new(inner) }
    }

    /// A wrong configuration value ([`Kind::Config`]).
    pub fn config(message: impl Into<String>) -> Self {
        Self::new(Kind::Config, message)
    }

    /// Missing or malformed data ([`Kind::Data`]).
    pub fn data(message: impl Into<String>) -> Self {
        Self::new(Kind::Data, message)
    }

    /// A device that cannot do what was asked ([`Kind::Device`]).
    pub fn device(message: impl Into<String>) -> Self {
        Self::new(Kind::Device, message)
    }

    /// A failed computation ([`Kind::Run`]).
    pub fn run(message: impl Into<String>) -> Self {
        Self::new(Kind::Run, message)
    }

    /// The user asked to stop ([`Kind::Interrupted`]).
    pub fn interrupted() -> Self {
        Self::new(Kind::Interrupted, "interrupted")
            .help("run the same command again: finished stages are kept and the rest resumes")
    }

    /// The same error of another kind: what is wrong in a configuration is damaged data in a checkpoint.
    #[must_use]
    pub fn of_kind(mut self, kind: Kind) -> Self {
        self.inner.kind = kind;
        self
    }

    /// Adds the file the error is about, unless one is already named (the innermost one is the precise one).
    #[must_use]
    pub fn file(self, path: impl AsRef<Path>) -> Self {
        if self.place("file").is_some() {
            return self;
        }
        self.at("file", path.as_ref().display().to_string())
    }

    /// Adds the configuration key, data column or tensor name the error is about.
    #[must_use]
    pub fn key(self, key: impl Into<String>) -> Self {
        self.at("key", key)
    }

    /// Adds any other place: `line`, `row`, `stage`, ….
    #[must_use]
    pub fn at(mut self, what: &'static str, value: impl Into<String>) -> Self {
        self.inner.at.push((what, value.into()));
        self
    }

    /// Says what the user can do about it.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.inner.help = Some(help.into());
        self
    }

    /// Keeps the error that caused this one.
    #[must_use]
    pub fn source(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.inner.source = Some(source.into());
        self
    }

    /// The class of the error.
    pub fn kind(&self) -> Kind {
        self.inner.kind
    }

    /// The message alone, without places, remedy or cause.
    pub fn message(&self) -> &str {
        &self.inner.message
    }

    /// The remedy, if there is one.
    pub fn remedy(&self) -> Option<&str> {
        self.inner.help.as_deref()
    }

    /// What caused the error, outermost first. An error whose text holds that of its own cause is not told twice: of an
    /// [`Error`] among the causes only the message counts, and a message that was already given is left out.
    pub fn causes(&self) -> Vec<String> {
        let mut causes: Vec<String> = Vec::new();
        let mut next = std::error::Error::source(self);
        while let Some(error) = next {
            let text =
                error.downcast_ref::<Error>().map_or_else(|| error.to_string(), |error| error.message().to_owned());
            let told = |known: &str| known.contains(text.trim());
            if !told(self.message()) && !causes.iter().any(|cause| told(cause)) {
                causes.push(text);
            }
            next = error.source();
        }
        causes
    }

    /// Whether the process that met this error cannot use its device any more.
    pub fn is_device_lost(&self) -> bool {
        self.kind() == Kind::Device
            && self.causes().iter().any(|cause| Self::LOST.iter().any(|code| cause.contains(code)))
    }

    /// The places the error names, innermost first.
    pub fn places(&self) -> &[(&'static str, String)] {
        &self.inner.at
    }

    /// The first place of that name.
    pub fn place(&self, what: &str) -> Option<&str> {
        self.inner.at.iter().find(|(name, _)| *name == what).map(|(_, value)| value.as_str())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.inner.message)?;
        for (what, value) in &self.inner.at {
            write!(f, "\n  {what}: {value}")?;
        }
        for cause in self.causes() {
            write!(f, "\n  cause: {}", cause.replace('\n', "\n  "))?;
        }
        if let Some(help) = &self.inner.help {
            write!(f, "\n  help: {help}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.inner.kind)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.inner.source.as_ref().map(|source| &**source as &(dyn std::error::Error + 'static))
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        let text = error.to_string();
        let says = |codes: &[&str]| codes.iter().any(|code| text.contains(code));
        if says(&["CUDA_ERROR_OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED"]) {
            return Self::device("the device has no memory left").source(error).help(
                "lower batch_size (accumulate makes up for it), set checkpointing = true, store the base in fewer bits \
                 (dtype = \"q4k\"), or run fewer --jobs on this device",
            );
        }
        if says(&Self::LOST) {
            return Self::device(
                "the device is lost: an operation on it failed, and it takes no others in this process",
            )
            .source(error)
            .help("run again: finished stages are kept; if it fails again, report it with the cause above");
        }
        Self::run("a tensor operation failed").source(error)
    }
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        Self::wrap(error)
    }
}

/// Turns an I/O error about `path` into an error that names it, with a remedy.
pub fn io_error(action: &str, path: &Path, error: std::io::Error) -> Error {
    use std::io::ErrorKind;
    let help = match error.kind() {
        ErrorKind::NotFound => "check the path",
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            "check the permissions of this file and of the folders around it"
        }
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            "free space on this disk; the same command then goes on where this one stopped"
        }
        ErrorKind::IsADirectory => "give the path of a file, not of a folder",
        ErrorKind::NotADirectory | ErrorKind::AlreadyExists => "a file stands where a folder is needed: check the path",
        ErrorKind::InvalidFilename => "choose a shorter name without special characters",
        ErrorKind::InvalidData => "the file must be text in UTF-8",
        _ => "run the same command again; if the error stays, check the disk",
    };
    Error::data(format!("cannot {action} `{}`", path.display())).file(path).source(error).help(help)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_place_and_remedy() {
        let error =
            Error::config("`rho` must be at least 0, found `-1`").key("align.rho").file("a.toml").help("set rho = 2.0");
        assert_eq!(
            error.to_string(),
            "`rho` must be at least 0, found `-1`\n  key: align.rho\n  file: a.toml\n  help: set rho = 2.0"
        );
        assert_eq!(error.kind().exit_code(), 2);
    }

    #[test]
    fn errors_of_a_device_say_what_to_do() {
        let of = |text: &str| Error::from(candle_core::Error::Msg(text.to_owned()));
        let memory = of("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")");
        assert_eq!((memory.kind(), memory.is_device_lost()), (Kind::Device, false));
        assert!(memory.remedy().is_some_and(|help| help.contains("batch_size") && help.contains("checkpointing")));
        let lost = of("DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, \"an illegal memory access\")");
        assert_eq!((lost.kind(), lost.is_device_lost()), (Kind::Device, true));
        assert_eq!(of("shape mismatch").kind(), Kind::Run);
        assert!(!Error::run("CUDA_ERROR_ILLEGAL_ADDRESS").is_device_lost());
    }

    #[test]
    fn each_cause_is_told_once() {
        let missing = || std::io::Error::new(std::io::ErrorKind::NotFound, "no such file");
        let inner = io_error("read", Path::new("a.json"), missing());
        let outer = Error::data(inner.message()).file("a.json").help("check the path").source(inner);
        assert_eq!(
            outer.to_string(),
            "cannot read `a.json`\n  file: a.json\n  cause: no such file\n  help: check the path"
        );
        let wrapped = Error::run("the stage failed").source(io_error("read", Path::new("a.json"), missing()));
        assert_eq!(wrapped.causes(), ["cannot read `a.json`", "no such file"]);
        // candle shows what it wraps, and names it as its source, too.
        let through = Error::from(candle_core::Error::from(missing()));
        assert_eq!(through.causes(), ["no such file"]);
    }

    #[test]
    fn every_failed_access_has_a_remedy() {
        use std::io::ErrorKind::{Other, PermissionDenied, QuotaExceeded, StorageFull};
        for (kind, remedy) in [
            (StorageFull, "free space"),
            (QuotaExceeded, "free space"),
            (PermissionDenied, "permissions"),
            (Other, "again"),
        ] {
            let error = io_error("write", Path::new("a"), kind.into());
            assert!(error.remedy().is_some_and(|help| help.contains(remedy)), "{error}");
        }
    }
}
