//! Answers that must match the gold text.

use crate::outcome::Outcome;
use crate::place;

/// Right if the completion is the gold text, or says it in `\boxed{…}`, in `<answer>…</answer>` or
/// after the last "answer is" or "answer:". Case, runs of white space, emphasis and quotes around
/// the text and a full stop at its end do not count; everything else does.
///
/// An empty completion is unparsable. Thoughts up to `</think>` are left out.
pub(crate) fn grade(completion: &str, gold: &str) -> Outcome {
    let text = place::after_thought(completion);
    if folded(text).is_empty() {
        return Outcome::Unparsable;
    }
    let gold = folded(gold);
    let marked = [place::boxed(text), place::tagged(text), place::after_phrase(text)];
    let mut said = marked.into_iter().flatten().chain([text]).map(folded);
    if said.any(|said| said == gold) { Outcome::Right } else { Outcome::Wrong }
}

/// Lower case, single spaces, nothing around it.
fn folded(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    let dressing = |c: char| "*_`\"'“”‘’ .".contains(c);
    words.join(" ").trim_matches(dressing).to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn case_space_and_a_full_stop_do_not_count() {
        for text in [" True.", "TRUE", "**true**", "the correct answer is true", "Answer: True\n"] {
            assert_eq!(grade(text, "true"), Outcome::Right, "{text}");
        }
        assert_eq!(grade("New \n York", "new york"), Outcome::Right);
    }

    #[test]
    fn anything_else_is_wrong_and_nothing_is_unparsable() {
        for text in ["false", "true or false", "true, I think", "untrue"] {
            assert_eq!(grade(text, "true"), Outcome::Wrong, "{text}");
        }
        for text in ["", " \n", "."] {
            assert_eq!(grade(text, "true"), Outcome::Unparsable, "{text}");
        }
    }
}
