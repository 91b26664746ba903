//! SentencePiece BPE tokenizers (`tokenizer.ggml.model = llama`): Llama 2, Mistral, Gemma.
//!
//! SentencePiece merges, again and again, the two neighbours whose union has the highest score. The
//! same order as ranked merges: for every token, each way to cut it into two tokens is a merge, and
//! merges rank by the token's score, then by longer left part (the conversion that made the models'
//! `tokenizer.json` files).

use tokenizers::decoders::DecoderWrapper;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as DecoderSequence;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::{NormalizerWrapper, Prepend, Replace, Sequence};

use super::tokenizer::broken;
use super::tokenizer_bpe::pairs;
use super::tokenizer_gguf::{Kind, Metadata, missing, vocabulary};
use crate::Result;

/// What SentencePiece writes for a space.
const SPACE: &str = "\u{2581}";

/// The pipeline without added tokens and post-processor, the tokens, and their kinds.
pub(super) fn build(meta: &Metadata) -> Result<(tokenizers::Tokenizer, Vec<String>, Vec<Kind>)> {
    let tokens: Vec<String> =
        meta.tokens()?.into_iter().map(|token| token.replace(' ', SPACE)).collect();
    let kinds = meta.kinds(tokens.len())?;
    let vocab = vocabulary(&tokens)?;
    let merges = match (meta.merges()?, meta.scores(tokens.len())?) {
        (Some(merges), _) => pairs(&merges)?,
        (None, Some(scores)) => merges_of_scores(&tokens, &kinds, &scores, &vocab),
        (None, None) => return Err(missing("scores")),
    };
    let unknown = kinds.iter().position(|kind| *kind == Kind::Unknown).unwrap_or(0);
    let mut builder =
        BPE::builder().vocab_and_merges(vocab, merges).byte_fallback(true).fuse_unk(true);
    if let Some(token) = tokens.get(unknown) {
        builder = builder.unk_token(token.clone());
    }
    let model = builder.build().map_err(|error| broken("vocabulary and scores", error))?;
    let prefix = meta.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    Ok((pipeline(model, prefix)?, tokens, kinds))
}

/// Spaces become ▁ (one more in front with `prefix`), unknown characters become bytes, and back.
fn pipeline(model: BPE, prefix: bool) -> Result<tokenizers::Tokenizer> {
    let replace =
        |from: &str, to: &str| Replace::new(from, to).map_err(|error| broken("normalizer", error));
    let mut normalizers: Vec<NormalizerWrapper> = vec![replace(" ", SPACE)?.into()];
    let mut decoders: Vec<DecoderWrapper> =
        vec![replace(SPACE, " ")?.into(), ByteFallback::new().into(), Fuse::new().into()];
    if prefix {
        normalizers.insert(0, Prepend::new(SPACE.to_string()).into());
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    let mut inner = tokenizers::Tokenizer::new(model);
    inner
        .with_normalizer(Some(Sequence::new(normalizers)))
        .map_err(|error| broken("normalizer", error))?;
    inner.with_decoder(Some(DecoderSequence::new(decoders)));
    Ok(inner)
}

/// A merge of two pieces into one, with what it is ranked by.
struct Merge<'a> {
    score: f32,
    left: &'a str,
    right: &'a str,
    /// Characters of both.
    lengths: (usize, usize),
    ids: (u32, u32),
}

/// Merges in the order of their rank. User-defined tokens come first, as SentencePiece finds them
/// before it merges; control, unknown and byte tokens are never merged.
fn merges_of_scores(tokens: &[String], kinds: &[Kind], scores: &[f32], vocab: &Vocab) -> Merges {
    let mut merges: Vec<Merge> = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        let score = match kinds[id] {
            Kind::Normal => scores[id],
            Kind::UserDefined => f32::INFINITY,
            _ => continue,
        };
        let first = merges.len();
        let length = token.chars().count();
        for (chars, (at, _)) in token.char_indices().enumerate().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(l), Some(r)) = (vocab.get(left), vocab.get(right)) {
                let lengths = (chars, length - chars);
                merges.push(Merge { score, left, right, lengths, ids: (*l, *r) });
            }
        }
        merges[first..].sort_by_key(|merge| merge.ids);
    }
    merges.sort_by(|a, b| b.score.total_cmp(&a.score).then_with(|| b.lengths.cmp(&a.lengths)));
    merges.iter().map(|merge| (merge.left.to_string(), merge.right.to_string())).collect()
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::gguf_file::Value;

    use super::super::tokenizer::Tokenizer;
    use super::super::tokenizer_gguf::tests::{metadata, text};

    const TOKENS: [(&str, i32); 14] = [
        ("<unk>", 2),
        ("<s>", 3),
        ("</s>", 3),
        ("<0xC3>", 6),
        ("<0xA9>", 6),
        ("▁", 1),
        ("a", 1),
        ("b", 1),
        ("ab", 1),
        ("▁a", 1),
        ("▁ab", 1),
        ("bb", 1),
        ("  ", 4),
        ("c", 1),
    ];

    fn tokenizer(more: Vec<(&str, Value)>) -> Tokenizer {
        let scores = [0., 0., 0., 0., 0., -9., -9., -9., -2., -3., -4., -1., -1000., -9.];
        let scores = scores.into_iter().map(Value::F32).collect();
        let mut keys = vec![("model", text("llama")), ("scores", Value::Array(scores))];
        keys.extend(more);
        Tokenizer::from_gguf(&metadata(&TOKENS, keys)).unwrap()
    }

    fn pieces(tokenizer: &Tokenizer, text: &str) -> Vec<String> {
        let ids = tokenizer.encode(text, false).unwrap();
        ids.iter().map(|id| tokenizer.id_to_token(*id).unwrap()).collect()
    }

    #[test]
    fn the_pair_of_the_highest_score_merges_first() {
        let tokenizer = tokenizer(vec![]);
        assert_eq!(pieces(&tokenizer, "ab"), ["▁ab"]);
        assert_eq!(pieces(&tokenizer, "abb"), ["▁a", "bb"]);
        assert_eq!(pieces(&tokenizer, "c  a"), ["▁", "c", "▁▁", "a"]);
    }

    #[test]
    fn text_begins_with_bos_and_a_space_and_comes_back_without() {
        let with_prefix = tokenizer(vec![]);
        assert_eq!(with_prefix.encode("ab", true).unwrap(), [1, 10]);
        assert_eq!(with_prefix.decode(&[1, 10, 10], true).unwrap(), "ab ab");
        let without = tokenizer(vec![("add_space_prefix", Value::Bool(false))]);
        assert_eq!(without.encode("ab", true).unwrap(), [1, 8]);
        assert_eq!(without.decode(&[10], true).unwrap(), " ab");
    }

    #[test]
    fn unknown_characters_become_bytes_or_the_unknown_token() {
        let tokenizer = tokenizer(vec![("add_space_prefix", Value::Bool(false))]);
        assert_eq!(tokenizer.encode("é", false).unwrap(), [3, 4]);
        assert_eq!(tokenizer.decode(&[3, 4], false).unwrap(), "é");
        assert_eq!(tokenizer.encode("xy", false).unwrap(), [0]);
        assert_eq!(tokenizer.encode("<0xC3>", false).unwrap(), [0], "not the byte token");
    }

    #[test]
    fn streaming_holds_a_character_of_two_byte_tokens() {
        let tokenizer = tokenizer(vec![]);
        let mut stream = tokenizer.decode_stream(true);
        let ids = [1, 10, 3, 4, 10, 2, 10];
        let pieces: Vec<String> = ids.iter().map(|id| stream.step(*id).unwrap()).collect();
        assert_eq!(pieces, ["", "ab", "", "é", " ab", "", " ab"]);
    }

    #[test]
    fn a_file_without_scores_is_refused() {
        let error = Tokenizer::from_gguf(&metadata(&TOKENS, vec![("model", text("llama"))]));
        assert!(error.err().unwrap().to_string().contains("no tokenizer.ggml.scores"));
    }
}
