//! A row of a data set, as text.

use serde::{Deserialize, Serialize};

/// One row of a data set: an instruction, an optional input to it, and the answer to learn or to compare with.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Row {
    /// What the user asks. Empty for plain documents, which are learnt from their first token on.
    pub instruction: String,
    /// What the instruction is about, where the data set keeps it apart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<String>,
    /// The answer.
    pub output: String,
}

impl Row {
    /// A row without an input.
    pub fn new(instruction: impl Into<String>, output: impl Into<String>) -> Self {
        Self { instruction: instruction.into(), input: None, output: output.into() }
    }
}
