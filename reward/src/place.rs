//! Where a completion says its answer.

/// What follows the last `</think>`: thoughts are no answer. All of the text without one.
pub(crate) fn after_thought(text: &str) -> &str {
    text.rsplit_once("</think>").map_or(text, |(_, after)| after)
}

/// The inside of the last `\boxed{…}` if its braces balance.
pub(crate) fn boxed(text: &str) -> Option<&str> {
    const OPENING: &str = r"\boxed{";
    let inside = &text[text.rfind(OPENING)? + OPENING.len()..];
    let mut depth = 1usize;
    for (at, byte) in inside.bytes().enumerate() {
        match byte {
            b'{' => depth += 1,
            b'}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(&inside[..at]);
        }
    }
    None
}

/// The inside of the last `<answer>…</answer>`; to the end of the text if generation stopped at
/// the closing tag.
pub(crate) fn tagged(text: &str) -> Option<&str> {
    let (_, inside) = text.rsplit_once("<answer>")?;
    Some(inside.split_once("</answer>").map_or(inside, |(inside, _)| inside))
}

/// What follows the last "answer is", "answer:" or "answer**:", in any case.
pub(crate) fn after_phrase(text: &str) -> Option<&str> {
    let lower = text.to_ascii_lowercase();
    let phrases = ["answer is", "answer:", "answer**:"];
    let end = |phrase: &&str| lower.rfind(*phrase).map(|at| at + phrase.len());
    phrases.iter().filter_map(end).max().map(|at| &text[at..])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_last_of_each_kind_counts() {
        assert_eq!(boxed(r"\boxed{1} then \boxed{\frac{1}{2}}."), Some(r"\frac{1}{2}"));
        assert_eq!(tagged("<answer>1</answer> <answer> 2 </answer>"), Some(" 2 "));
        assert_eq!(after_phrase("Answer: 1. The answer is 2"), Some(" 2"));
        assert_eq!(after_thought("<think>5</think> 6"), " 6");
    }

    #[test]
    fn an_open_box_is_none_and_an_open_tag_reaches_the_end() {
        assert_eq!(boxed(r"\boxed{18"), None);
        assert_eq!(tagged("<answer>18"), Some("18"));
    }

    proptest! {
        #[test]
        fn any_text_is_searched_without_panic(
            text in r"(\PC|\\boxed\{|\}|<answer>|answer is){0,20}",
        ) {
            let _ = (boxed(&text), tagged(&text), after_phrase(&text), after_thought(&text));
        }
    }
}
