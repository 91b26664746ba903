//! The chosen option of a multiple-choice question.

use crate::outcome::Outcome;
use crate::place;

/// The option, A to E, that a completion chooses. The first of these places that holds one is
/// taken: the last `\boxed{…}`, the last `<answer>…</answer>`, what follows the last "answer is" or
/// "answer:", the whole text. In the first three the first letter counts, in the last one the last.
///
/// A letter stands alone: `(A)`, `A)`, `A.`, `**A**` or bare. The article ("A man …") is none.
/// Thoughts up to `</think>` are left out.
pub fn final_letter(completion: &str) -> Option<char> {
    let text = place::after_thought(completion);
    let marked = [place::boxed(text), place::tagged(text), place::after_phrase(text)];
    let mut stated = marked.into_iter().flatten().filter_map(|inside| letters(inside).next());
    stated.next().or_else(|| letters(text).last())
}

/// Compares the chosen letter with the gold one, which may be in lower case.
pub(crate) fn grade(completion: &str, gold: &str) -> Outcome {
    match final_letter(completion) {
        None => Outcome::Unparsable,
        Some(letter) if gold.trim().eq_ignore_ascii_case(letter.encode_utf8(&mut [0; 4])) => {
            Outcome::Right
        }
        Some(_) => Outcome::Wrong,
    }
}

/// The capital letters A to E that stand alone, in order.
fn letters(text: &str) -> impl Iterator<Item = char> {
    let mut before = ' ';
    text.char_indices().filter_map(move |(at, letter)| {
        let previous = std::mem::replace(&mut before, letter);
        let alone = ('A'..='E').contains(&letter) && !is_word(previous);
        (alone && ends_here(letter, &text[at + letter.len_utf8()..])).then_some(letter)
    })
}

/// Whether nothing that follows makes the letter part of a word or an article.
fn ends_here(letter: char, rest: &str) -> bool {
    let mut chars = rest.chars();
    let (next, after) = (chars.next().unwrap_or(' '), chars.next().unwrap_or(' '));
    let joined = "'’-".contains(next) && after.is_alphanumeric();
    let article = letter == 'A' && next == ' ' && after.is_lowercase();
    !is_word(next) && !joined && !article
}

/// Whether a character belongs to a word or a LaTeX command's name.
fn is_word(c: char) -> bool {
    c.is_alphanumeric() || "'’\\".contains(c)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_way_to_name_an_option_is_read() {
        let forms =
            ["C", "(C)", "C)", "C.", "**C**", "C) 5 km", r"\boxed{C}", r"\boxed{\text{(C)}}"];
        let said = ["The answer is C.", "Answer: (C)", "answer is **C**", "Correct answer - C"];
        let long = ["A) is too big, B) too small, so C", "<answer>C</answer> not D"];
        for text in forms.iter().chain(&said).chain(&long) {
            assert_eq!(final_letter(text), Some('C'), "{text}");
            assert_eq!(grade(text, "C"), Outcome::Right);
            assert_eq!(grade(text, "D"), Outcome::Wrong);
        }
    }

    #[test]
    fn words_and_articles_are_no_options() {
        for text in ["A man walks", "Because it is", "c", "E-mail", "A's", "F", "", "answer is 5"] {
            assert_eq!(final_letter(text), None, "{text}");
        }
        assert_eq!(final_letter("The answer is D. A man walks 5 km."), Some('D'));
        assert_eq!(final_letter("<think>It is B</think> So (E)."), Some('E'));
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_panic(text in r"(\PC|A|\(B\)|answer is |\\boxed\{){0,20}") {
            let _ = final_letter(&text);
        }
    }
}
