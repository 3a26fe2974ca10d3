//! Log lines on standard error: which ones, and in what form.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime;

/// The environment variable of [`LogFormat`].
pub const FORMAT: &str = "TITER_LOG_FORMAT";

/// The form of log lines and of progress.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// Text; with the time unless it goes to a terminal.
    #[default]
    Text,
    /// One JSON object a line, with the time.
    Json,
}

/// What is logged, and how.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Logging {
    /// The number of `-v`.
    pub verbose: u8,
    /// The form.
    pub format: LogFormat,
}

impl Logging {
    /// The arguments that give another process of this program the same.
    pub fn arguments(self) -> Vec<&'static str> {
        let format = match self.format {
            LogFormat::Text => "text",
            LogFormat::Json => "json",
        };
        [vec!["--log-format", format], vec!["-v"; usize::from(self.verbose)]].concat()
    }

    /// Starts logging. `TITER_LOG`, or else `RUST_LOG`, takes filters such as `titer=debug`; without them, `-v` raises the
    /// level of Titer's own crates.
    pub fn start(self) {
        let level = ["warn", "info", "debug", "trace"][usize::from(self.verbose.min(3))];
        let default = format!("warn,titer={level},titer_core={level},titer_plugins={level}");
        let given = ["TITER_LOG", "RUST_LOG"].into_iter().find(|name| std::env::var_os(name).is_some());
        let given = given.and_then(|name| EnvFilter::try_from_env(name).ok());
        let filter = given.unwrap_or_else(|| EnvFilter::new(default));
        let terminal = std::io::stderr().is_terminal();
        // Colours are for terminals; a log file holds text. An empty NO_COLOR counts as unset.
        let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let logger = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
        let logger = logger.with_ansi(terminal && !plain);
        // A second call in one process, as in tests, keeps the first logger.
        let _ = match self.format {
            LogFormat::Json => logger.with_timer(Utc).json().try_init(),
            LogFormat::Text if terminal => logger.without_time().try_init(),
            LogFormat::Text => logger.with_timer(Utc).try_init(),
        };
    }
}

/// The time in UTC, to the second.
struct Utc;

impl FormatTime for Utc {
    fn format_time(&self, out: &mut Writer<'_>) -> std::fmt::Result {
        out.write_str(&now())
    }
}

/// The time in UTC, to the second, as RFC 3339 has it: in log lines and in the provenance of results.
pub fn now() -> String {
    jiff::Timestamp::now().round(jiff::Unit::Second).map_or_else(|_| String::new(), |now| now.to_string())
}
