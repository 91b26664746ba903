//! Byte-level BPE tokenizers (`tokenizer.ggml.model = gpt2`).
//!
//! `tokenizer.ggml.pre` names how a text is cut into words before the merges apply. The cuts here
//! are those of the models' own `tokenizer.json`.

use tokenizers::decoders::DecoderWrapper;
use tokenizers::models::bpe::{BPE, Merges};
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;

use super::tokenizer::broken;
use super::tokenizer_gguf::{Kind, Metadata, missing, vocabulary};
use crate::{Error, Result};

/// How a family cuts a text into words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    /// GPT-2's expression, which the byte-level pre-tokenizer has built in.
    Gpt2,
    /// Every digit alone, then GPT-2's expression.
    DigitsThenGpt2,
    /// Llama 3: numbers of up to three digits.
    Llama3,
    /// Qwen 2, 2.5 and 3: every digit alone; the text is NFC-normalised first.
    Qwen2,
    /// Mistral's tekken: words are also cut between lower and upper case.
    Tekken,
}

const LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// Values of `tokenizer.ggml.pre` and their cuts. Old files have no value or `default`.
const CUTS: [(&str, Cut); 16] = [
    ("default", Cut::Gpt2),
    ("gpt-2", Cut::Gpt2),
    ("gpt2", Cut::Gpt2),
    ("phi-2", Cut::Gpt2),
    ("olmo", Cut::Gpt2),
    ("smollm", Cut::DigitsThenGpt2),
    ("starcoder", Cut::DigitsThenGpt2),
    ("refact", Cut::DigitsThenGpt2),
    ("command-r", Cut::DigitsThenGpt2),
    ("llama-bpe", Cut::Llama3),
    ("llama3", Cut::Llama3),
    ("llama-v3", Cut::Llama3),
    ("smaug-bpe", Cut::Llama3),
    ("falcon3", Cut::Llama3),
    ("qwen2", Cut::Qwen2),
    ("tekken", Cut::Tekken),
];

/// The pipeline without added tokens and post-processor, the tokens, and their kinds.
pub(super) fn build(meta: &Metadata) -> Result<(tokenizers::Tokenizer, Vec<String>, Vec<Kind>)> {
    let cut = cut(meta)?;
    let tokens: Vec<String> = meta.tokens()?.into_iter().map(str::to_string).collect();
    let kinds = meta.kinds(tokens.len())?;
    let merges = pairs(&meta.merges()?.ok_or_else(|| missing("merges"))?)?;
    let model = BPE::builder()
        .vocab_and_merges(vocabulary(&tokens)?, merges)
        .ignore_merges(matches!(cut, Cut::Llama3 | Cut::Tekken))
        .build()
        .map_err(|error| broken("vocabulary and merges", error))?;

    let mut inner = tokenizers::Tokenizer::new(model);
    if cut == Cut::Qwen2 {
        inner.with_normalizer(Some(NFC)).map_err(|error| broken("normalizer", error))?;
    }
    inner.with_pre_tokenizer(Some(pre_tokenizer(cut)?));
    inner.with_decoder(Some(DecoderWrapper::ByteLevel(ByteLevel::new(false, true, true))));
    Ok((inner, tokens, kinds))
}

/// Whether a text begins with BOS where the file does not say: in Llama 3 only.
pub(super) fn adds_bos(meta: &Metadata) -> Result<bool> {
    Ok(cut(meta)? == Cut::Llama3)
}

fn cut(meta: &Metadata) -> Result<Cut> {
    let name = meta.text("tokenizer.ggml.pre")?.unwrap_or("default");
    let found = CUTS.iter().find(|(known, _)| *known == name);
    found.map(|(_, cut)| *cut).ok_or_else(|| {
        let known: Vec<&str> = CUTS.iter().map(|(known, _)| *known).collect();
        Error::failure(format!(
            "the GGUF file's pre-tokenizer '{name}' is not known (known: {}); use the model's \
             Hugging Face folder",
            known.join(", ")
        ))
    })
}

fn pre_tokenizer(cut: Cut) -> Result<PreTokenizerWrapper> {
    let by_regex = |regex: &str| -> Result<PreTokenizerWrapper> {
        let pattern = SplitPattern::Regex(regex.to_string());
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
            .map_err(|error| broken("pre-tokenizer", error))?;
        let bytes = ByteLevel::new(false, true, false);
        Ok(Sequence::new(vec![split.into(), bytes.into()]).into())
    };
    let gpt2 = ByteLevel::new(false, true, true);
    match cut {
        Cut::Gpt2 => Ok(gpt2.into()),
        Cut::DigitsThenGpt2 => {
            Ok(Sequence::new(vec![Digits::new(true).into(), gpt2.into()]).into())
        }
        Cut::Llama3 => by_regex(LLAMA3),
        Cut::Qwen2 => by_regex(QWEN2),
        Cut::Tekken => by_regex(TEKKEN),
    }
}

/// Merges `left right` as pairs. A piece may itself begin with a space, so the search for the
/// separating one starts at the second character.
pub(super) fn pairs(merges: &[&str]) -> Result<Merges> {
    let pair = |(rank, merge): (usize, &&str)| {
        let first = merge.chars().next().map_or(0, char::len_utf8);
        let space = merge[first..].find(' ').map(|at| first + at);
        space.map(|at| (merge[..at].to_string(), merge[at + 1..].to_string())).ok_or_else(|| {
            Error::failure(format!(
                "the GGUF file's merge {rank} ('{merge}') is not two pieces; the file is damaged"
            ))
        })
    };
    merges.iter().enumerate().map(pair).collect()
}

#[cfg(test)]
mod tests {
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    use super::super::tokenizer::Tokenizer;
    use super::super::tokenizer_gguf::tests::byte_level_metadata;
    use super::*;

    fn words(cut: Cut, text: &str) -> Vec<String> {
        let mut pieces = PreTokenizedString::from(text);
        pre_tokenizer(cut).unwrap().pre_tokenize(&mut pieces).unwrap();
        let splits = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
        splits.into_iter().map(|(word, _, _)| word.replace('Ġ', "_")).collect()
    }

    #[test]
    fn each_family_cuts_numbers_and_words_its_own_way() {
        let text = "it's  12345 fooBar";
        assert_eq!(words(Cut::Gpt2, text), ["it", "'s", "_", "_12345", "_fooBar"]);
        let digits = ["it", "'s", "__", "1", "2", "3", "4", "5", "_fooBar"];
        assert_eq!(words(Cut::DigitsThenGpt2, text), digits);
        assert_eq!(words(Cut::Llama3, text), ["it", "'s", "_", "_", "123", "45", "_fooBar"]);
        let qwen = ["it", "'s", "_", "_", "1", "2", "3", "4", "5", "_fooBar"];
        assert_eq!(words(Cut::Qwen2, text), qwen);
        let tekken = ["it", "'s", "_", "_", "1", "2", "3", "4", "5", "_foo", "Bar"];
        assert_eq!(words(Cut::Tekken, text), tekken);
    }

    #[test]
    fn qwen2_normalises_and_others_do_not() {
        let ids = |pre: &str, text: &str| {
            let tokenizer = Tokenizer::from_gguf(&byte_level_metadata(pre)).unwrap();
            tokenizer.encode(text, false).unwrap()
        };
        assert_eq!(ids("qwen2", "e\u{301}"), ids("qwen2", "\u{e9}"));
        assert_ne!(ids("smollm", "e\u{301}"), ids("smollm", "\u{e9}"));
    }

    #[test]
    fn an_unknown_pre_tokenizer_is_refused_with_the_known_ones() {
        let error = Tokenizer::from_gguf(&byte_level_metadata("smolm")).err().unwrap().to_string();
        assert!(error.contains("'smolm' is not known") && error.contains("smollm"), "{error}");
    }

    #[test]
    fn a_merge_may_begin_with_a_space() {
        assert_eq!(
            pairs(&["a b", "  c"]).unwrap(),
            [("a".to_string(), "b".to_string()), (" ".to_string(), "c".to_string())]
        );
        assert!(pairs(&["ab"]).is_err());
        assert!(pairs(&[""]).is_err());
    }
}
