//! Jinja, within limits.

use minijinja::{Environment, ErrorKind, Value};

use crate::bounds;
use crate::error::{Error, Result};

/// What `text` makes of the variables that it is `told`, within the limits on work. Lines that hold a block alone leave
/// nothing behind, as where transformers renders chat templates.
///
/// # Errors
/// The text is malformed, takes too long, or fails by itself.
pub(super) fn rendered(
    mut environment: Environment,
    text: &str,
    keep_last_newline: bool,
    told: Value,
) -> Result<String> {
    environment.set_fuel(Some(bounds::TEMPLATE_FUEL));
    let mut syntax = environment.syntax().to_builder();
    syntax.keep_trailing_newline(keep_last_newline).trim_blocks(true).lstrip_blocks(true);
    environment.set_syntax(syntax.build().map_err(|error| Error::run("the template syntax").source(error))?);
    environment.render_str(text, told).map_err(|error| {
        if error.kind() == ErrorKind::OutOfFuel {
            let message = format!("the prompt template takes more than {} steps", bounds::TEMPLATE_FUEL);
            let help = "take out loops and repetitions; this is a limit of Titer";
            return Error::config(message).key("template").help(help);
        }
        Error::config(format!("the prompt template cannot be rendered: {error}")).key("template")
    })
}
