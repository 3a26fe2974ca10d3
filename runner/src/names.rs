//! Names and texts from elsewhere: what a name may be, and how any text is shown.

use titer_core::{Error, Result};

/// The longest name, in characters: file names are made of names, and tables must hold them.
const LONGEST: usize = 100;

/// What pandas reads as "no value", whether quoted or not; other programs read some of these alike.
pub const MISSING: [&str; 19] = [
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "null",
];

/// Refuses a name that a file name, a terminal or a table could not hold.
///
/// # Errors
/// It is empty, too long, begins or ends with a space, has a character that cannot be seen, or means "no value" to programs
/// that read tables.
pub fn check(name: &str) -> Result<()> {
    let refuse = |why: String, help: &str| Err(Error::config(why).help(help));
    if name.is_empty() {
        return refuse("the name is empty".to_owned(), "give it a name");
    }
    let length = name.chars().count();
    if length > LONGEST {
        return refuse(format!("the name has {length} characters"), "use at most 100");
    }
    if let Some(c) = name.chars().find(|c| hidden(*c)) {
        let message =
            format!("the name `{}` has the character U+{:04X}, which cannot be seen", visible(name), c as u32);
        return refuse(message, "use letters, digits, spaces and punctuation");
    }
    if name.trim() != name {
        return refuse(format!("the name `{name}` begins or ends with a space"), "remove the space");
    }
    if MISSING.contains(&name) {
        let message = format!("the name `{name}` means `no value` to programs that read the tables");
        return refuse(message, "choose another one, such as \"Unaligned\" for a model without alignment");
    }
    Ok(())
}

/// Whether a character has no form of its own, but acts on what is around it: controls, line ends, marks of direction,
/// zero width.
fn hidden(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
            | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// Text in which what cannot be seen is spelled out, so that it acts on no terminal and no table: `\n`, `\u{202e}`.
pub fn visible(text: &str) -> String {
    spelled_out(text, hidden, |c| c.escape_default().to_string())
}

/// Likewise, but line ends stay.
pub fn visible_lines(text: &str) -> String {
    spelled_out(text, |c| c != '\n' && hidden(c), |c| c.escape_default().to_string())
}

/// JSON in which what cannot be seen is spelled out as JSON does: `\u202e`.
pub fn visible_json(json: &str) -> String {
    let escape = |c: char| c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")).collect();
    spelled_out(json, hidden, escape)
}

fn spelled_out(text: &str, hidden: impl Fn(char) -> bool, escape: impl Fn(char) -> String) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if hidden(c) { shown += &escape(c) } else { shown.push(c) }
    }
    shown
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_of_all_languages_pass_and_tricks_do_not() {
        for name in ["Vaccine (strong)", "ρ = 3", "無", "a|b", "=1+1", "none", "नमस्ते", &"x".repeat(100)]
        {
            assert!(check(name).is_ok(), "{name}");
        }
        let tricks = ["", " x", "a\nb", "a\rb", "\u{1b}[31mred", "a\u{202e}b", "a\u{200b}b", "a\u{2028}b", "a\u{9b}b"];
        for name in tricks.into_iter().chain([&*"x".repeat(101)]).chain(MISSING) {
            let error = check(name).expect_err(name);
            assert!(error.remedy().is_some() && !error.message().chars().any(hidden), "{error:?}");
        }
    }

    #[test]
    fn what_cannot_be_seen_is_spelled_out() {
        assert_eq!(visible("a\n\u{1b}[1m\u{202e}ü"), "a\\n\\u{1b}[1m\\u{202e}ü");
        assert_eq!(visible_lines("a\n\tb"), "a\n\\tb");
        assert_eq!(visible_json("\"\u{7f}\u{e0001}\""), "\"\\u007f\\udb40\\udc01\"");
    }

    proptest! {
        #[test]
        fn nothing_hidden_is_left(text in "\\PC*|[\\x00-\\x9f\u{200b}-\u{206f}]*") {
            prop_assert!(!visible(&text).chars().any(hidden));
        }
    }
}
