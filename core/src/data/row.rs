//! A row of a data set, as text.

use serde::{Deserialize, Serialize};

/// One row of a data set: an instruction, an optional input to it, and the answer to learn or to compare with.
///
/// ```
/// use titer_core::Row;
/// use titer_core::text::Template;
///
/// let row = Row { input: Some("a dull film".into()), ..Row::new("Positive or negative?", "negative") };
/// let prompt = Template::new("{{ instruction }} {{ input }}:").render(&row)?;
/// assert_eq!(prompt, "Positive or negative? a dull film:");
/// # Ok::<(), titer_core::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Row {
    /// What the user asks. Empty for plain documents, which are learnt from their first token on.
    pub instruction: String,
    /// What the instruction is about, where the data set keeps it apart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<String>,
    /// The answer.
    pub output: String,
    /// What was said before the instruction, where the row is a conversation.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<Message>,
}

/// One turn of a conversation.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user` or `assistant`.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Row {
    /// A row without an input and without earlier turns.
    pub fn new(instruction: impl Into<String>, output: impl Into<String>) -> Self {
        Self { instruction: instruction.into(), input: None, output: output.into(), history: Vec::new() }
    }
}
