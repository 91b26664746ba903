//! Texts that end a completion.

use crate::model::Tokenizer;

/// Looks for stop strings at the end of what was generated.
pub struct StopStrings<'a> {
    tokenizer: &'a Tokenizer,
    texts: &'a [String],
    /// Tokens from the end within which a stop string that was just completed begins.
    reach: usize,
}

impl<'a> StopStrings<'a> {
    /// A search for any of `texts`, none of them empty.
    pub fn new(tokenizer: &'a Tokenizer, texts: &'a [String]) -> Self {
        // a token holds a byte at least, but for a few that decode to nothing
        let longest = texts.iter().map(String::len).max().unwrap_or(0);
        StopStrings { tokenizer, texts, reach: longest + 4 }
    }

    /// Whether the last of `tokens` completed a stop string.
    pub fn found(&self, tokens: &[u32]) -> bool {
        if self.texts.is_empty() {
            return false;
        }
        let end = &tokens[tokens.len().saturating_sub(self.reach)..];
        let text = self.tokenizer.decode(end, true).unwrap_or_default();
        self.texts.iter().any(|stop| text.contains(stop))
    }
}
