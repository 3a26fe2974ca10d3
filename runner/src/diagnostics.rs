//! Errors as the user sees them: what is wrong, in which line, and what to do about it.

use std::fmt;
use std::process::ExitCode;

use titer_core::{Error, Kind};

/// Every mistake found, never only the first.
#[derive(Debug, Default)]
pub struct Problems(Vec<Error>);

impl Problems {
    /// Adds one.
    pub fn push(&mut self, error: Error) {
        self.0.push(error);
    }

    /// The mistakes in the order they were found.
    pub fn errors(&self) -> &[Error] {
        &self.0
    }

    /// `value`, if nothing was found.
    ///
    /// # Errors
    /// Something was; mistakes in a file come in the order of its lines.
    pub fn into_result<T>(mut self, value: T) -> Result<T, Problems> {
        let line = |error: &Error| error.place("line").and_then(|line| line.parse::<usize>().ok());
        self.0.sort_by_key(|error| line(error).unwrap_or(usize::MAX));
        if self.0.is_empty() { Ok(value) } else { Err(self) }
    }

    /// The exit code of the gravest class: a wrong configuration before missing data before the rest.
    pub fn exit_code(&self) -> ExitCode {
        let rank =
            |kind: &Kind| [Kind::Interrupted, Kind::Config, Kind::Data, Kind::Device].iter().position(|k| k == kind);
        let kinds = self.0.iter().map(Error::kind);
        let gravest = kinds.min_by_key(|kind| rank(kind).unwrap_or(usize::MAX));
        ExitCode::from(gravest.unwrap_or(Kind::Run).exit_code())
    }
}

impl FromIterator<Error> for Problems {
    fn from_iter<I: IntoIterator<Item = Error>>(errors: I) -> Self {
        Self(errors.into_iter().collect())
    }
}

impl From<Error> for Problems {
    fn from(error: Error) -> Self {
        Self(vec![error])
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            write_error(f, error)?;
        }
        match self.0.len() {
            0 | 1 => Ok(()),
            count => write!(f, "\n{count} errors\n"),
        }
    }
}

/// The remedy of a computation that fails without one of its own: nobody has foreseen it.
const DEFECT: &str = "this is a defect of Titer or of a plugin; please report it with the configuration";

/// The layout of compilers: message, place, the line itself, the other places, cause and remedy.
fn write_error(f: &mut fmt::Formatter<'_>, error: &Error) -> fmt::Result {
    writeln!(f, "error: {}", error.message())?;
    let (file, line) = (error.place("file"), error.place("line"));
    if let Some(file) = file {
        let line = line.map_or_else(String::new, |line| format!(":{line}"));
        writeln!(f, "  --> {file}{line}")?;
    }
    if let (Some(line), Some(text)) = (line, error.place("text")) {
        let margin = " ".repeat(line.len());
        writeln!(f, " {margin} |\n {line} | {text}\n {margin} |")?;
    }
    for (what, value) in error.places().iter().filter(|(what, _)| !["file", "line", "text"].contains(what)) {
        writeln!(f, "  {what}: {value}")?;
    }
    for cause in error.causes() {
        writeln!(f, "  cause: {}", cause.replace('\n', "\n  "))?;
    }
    match error.remedy().or((error.kind() == Kind::Run).then_some(DEFECT)) {
        Some(help) => writeln!(f, "  help: {help}"),
        None => Ok(()),
    }
}

/// The error that stands for a panic of the stage or the command.
pub(crate) fn panicked(what: &str, panic: &(dyn std::any::Any + Send)) -> Error {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    Error::run(format!("the {what} panicked: {}", text.unwrap_or("no message"))).help(DEFECT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_error_shows_its_line() {
        let error = Error::config("unknown key `lern`; did you mean `learning_rate`?")
            .key("align.train.lern")
            .file("a.toml")
            .at("line", "12")
            .at("text", "lern = 1")
            .help("known keys: learning_rate");
        assert_eq!(
            Problems::from(error).to_string(),
            "error: unknown key `lern`; did you mean `learning_rate`?\n  --> a.toml:12\n    |\n 12 | lern = 1\n    |\n  \
             key: align.train.lern\n  help: known keys: learning_rate\n"
        );
    }

    #[test]
    fn the_gravest_kind_gives_the_exit_code() {
        let mut problems = Problems::from(Error::run("a"));
        assert_eq!(problems.exit_code(), ExitCode::from(1));
        problems.push(Error::data("b"));
        assert_eq!(problems.exit_code(), ExitCode::from(3));
        problems.push(Error::config("c"));
        assert_eq!(problems.exit_code(), ExitCode::from(2));
    }
}
