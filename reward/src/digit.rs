//! Answers of one digit, as in ListOps (Nangia and Bowman 2018).

use crate::outcome::Outcome;

/// Compares the digit that the completion begins with, which must stand alone: the end, white
/// space or punctuation that ends a clause follows. `7`, `7.` and `7 is the maximum` are 7; `12`,
/// `7/2`, `7.5` and `The answer is 7` are unparsable.
pub(crate) fn grade(completion: &str, gold: &str) -> Outcome {
    match first_digit(completion) {
        None => Outcome::Unparsable,
        digit if digit == first_digit(gold) => Outcome::Right,
        Some(_) => Outcome::Wrong,
    }
}

/// The digit at the start of the trimmed text if it stands alone.
fn first_digit(text: &str) -> Option<char> {
    let mut chars = text.trim().chars();
    let digit = chars.next().filter(char::is_ascii_digit)?;
    let rest = chars.as_str().trim_start_matches(['.', ',', ';', ':', '!', ')', ']']);
    let ended = rest.chars().next().is_none_or(char::is_whitespace);
    ended.then_some(digit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_digit_alone_is_graded() {
        for text in ["7", " 7\n", "7.", "7 ]", "7, surely", "7\n8"] {
            assert_eq!(grade(text, "7"), Outcome::Right, "{text}");
            assert_eq!(grade(text, "8"), Outcome::Wrong, "{text}");
        }
    }

    #[test]
    fn everything_else_is_unparsable() {
        for text in ["", "12", "-7", "7.5", "7/2", "7%", "seven", "7th", "The answer is 7", "٧"] {
            assert_eq!(grade(text, "7"), Outcome::Unparsable, "{text}");
        }
    }
}
