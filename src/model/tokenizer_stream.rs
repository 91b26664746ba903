//! Decoding token by token for streaming output.

use super::tokenizer::Tokenizer;
use crate::Result;

/// Turns a stream of token ids into pieces of text, each of whole characters.
///
/// A token may hold part of a UTF-8 character, and a decoder may treat the first token of a text
/// differently. So each piece is the difference between two decodings that start at the same token:
/// one that ends where the last piece ended, and one with the new tokens. The pieces and
/// [`DecodeStream::finish`] together are the text that [`Tokenizer::decode`] gives for the ids,
/// as long as the ids decode to valid UTF-8.
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special_tokens: bool,
    /// Ids of the last piece, then the ids that are not given out yet.
    ids: Vec<u32>,
    /// How many of `ids` have been given out.
    given: usize,
    /// The text of `ids[..given]`.
    prefix: String,
}

impl<'a> DecodeStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, skip_special_tokens: bool) -> Self {
        let (ids, given, prefix) = (Vec::new(), 0, String::new());
        Self { tokenizer, skip_special_tokens, ids, given, prefix }
    }

    /// Takes the next token and returns the text that became complete, possibly none.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn step(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = self.pending()?;
        if text.is_empty() || text.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new());
        }
        self.ids.drain(..self.given);
        self.given = self.ids.len();
        self.prefix = self.tokenizer.decode(&self.ids, self.skip_special_tokens)?;
        Ok(text)
    }

    /// Ends the stream and returns what was held back: an unfinished character as U+FFFD.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(self) -> Result<String> {
        self.pending()
    }

    /// The text after what was given out. Where new tokens change the earlier text (invalid bytes
    /// after byte tokens), it is the text of the new tokens alone.
    fn pending(&self) -> Result<String> {
        let text = self.tokenizer.decode(&self.ids, self.skip_special_tokens)?;
        match text.strip_prefix(&self.prefix) {
            Some(rest) => Ok(rest.to_string()),
            None => self.tokenizer.decode(&self.ids[self.given..], self.skip_special_tokens),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tokenizer_gguf::tests::byte_level;

    fn streamed(ids: &[u32]) -> String {
        let tokenizer = byte_level();
        let mut stream = tokenizer.decode_stream(false);
        let mut text = String::new();
        for id in ids {
            text += &stream.step(*id).expect("a token decodes");
        }
        text + &stream.finish().expect("the rest decodes")
    }

    #[test]
    fn a_character_of_three_tokens_comes_out_whole() {
        let tokenizer = byte_level();
        let ids = tokenizer.encode("a€b", false).unwrap();
        assert_eq!(ids.len(), 5);
        let mut stream = tokenizer.decode_stream(false);
        let pieces: Vec<String> = ids.iter().map(|id| stream.step(*id).unwrap()).collect();
        assert_eq!(pieces, ["a", "", "", "€", "b"]);
    }

    #[test]
    fn an_unfinished_character_comes_out_at_the_end_as_replacement() {
        let tokenizer = byte_level();
        let ids = tokenizer.encode("a€", false).unwrap();
        assert_eq!(streamed(&ids[..3]), "a\u{fffd}");
    }

    proptest! {
        #[test]
        fn pieces_join_to_the_decoded_text(text in any::<String>()) {
            let tokenizer = byte_level();
            let ids = tokenizer.encode(&text, false).unwrap();
            prop_assert_eq!(streamed(&ids), text);
        }

        #[test]
        fn any_ids_stream_without_error(ids in proptest::collection::vec(0u32..270, 0..40)) {
            let tokenizer = byte_level();
            prop_assert_eq!(streamed(&ids), tokenizer.decode(&ids, false).unwrap());
        }
    }
}
