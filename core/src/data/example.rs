//! A row of a data set, as tokens.

/// One tokenised row. Labels are the tokens from `first_label` on; each is predicted from the position before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// Prompt, answer and end of text.
    pub tokens: Vec<u32>,
    /// Index of the first token that counts in the loss; at least 1.
    pub first_label: usize,
}

impl Example {
    /// How many tokens count in the loss.
    pub(super) fn labels(&self) -> usize {
        self.tokens.len().saturating_sub(self.first_label)
    }
}
