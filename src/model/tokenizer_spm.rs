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
    ids: (u32, u32),
}

/// Merges in the order of their rank. User-defined tokens come first, as SentencePiece finds them
/// before it merges; control, unknown and byte tokens are never merged.
fn merges_of_scores(tokens: &[String], kinds: &[Kind], scores: &[f32], vocab: &Vocab) -> Merges {
    let mut merges = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        let score = match kinds[id] {
            Kind::Normal => scores[id],
            Kind::UserDefined => f32::INFINITY,
            _ => continue,
        };
        let first = merges.len();
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(l), Some(r)) = (vocab.get(left), vocab.get(right)) {
                merges.push(Merge { score, left, right, ids: (*l, *r) });
            }
        }
        merges[first..].sort_by_key(|merge| merge.ids);
    }
    let length = |text: &str| text.chars().count();
    merges.sort_by(|a, b| {
        b.score
            .total_cmp(&a.score)
            .then_with(|| length(b.left).cmp(&length(a.left)))
            .then_with(|| length(b.right).cmp(&length(a.right)))
    });
    merges.iter().map(|merge| (merge.left.to_string(), merge.right.to_string())).collect()
}
