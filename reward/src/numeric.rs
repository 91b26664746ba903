//! The final number of an answer.

use crate::number::{Found, Number, next_number, number_at};
use crate::outcome::Outcome;
use crate::place;
use crate::tidy::tidy;

/// What a number cannot stand beside in a box: the whole is then another number.
const IRRATIONAL: [&str; 4] = [r"\sqrt", r"\pi", "√", "π"];

/// The number that a completion comes to. The first of these places that it has is taken:
///
/// 1. after the last `####` that a number follows (`#### Step 2` is a heading, as in lm-eval's
///    strict match);
/// 2. the last `\boxed{…}`, then the last `<answer>…</answer>`: none if these hold no number;
/// 3. after the last "answer is" or "answer:", if a number follows there;
/// 4. the last number of the text, as in lm-eval's flexible match.
///
/// Where a calculation is written (`#### 9 * 2 = 18`) its result counts. Thoughts up to `</think>`
/// are left out.
pub fn final_number(completion: &str) -> Option<Number> {
    let text = tidy(place::after_thought(completion));
    if let Some(number) = after_hashes(text.as_bytes()) {
        return Some(number);
    }
    if let Some(inside) = place::boxed(&text).or_else(|| place::tagged(&text)) {
        return enclosed(inside);
    }
    let phrase = place::after_phrase(&text).and_then(stated);
    phrase.or_else(|| last_number(text.as_bytes()))
}

/// Compares the final number of a completion with the gold one; see [`Number::same`].
pub(crate) fn grade(completion: &str, gold: &str) -> Outcome {
    match (final_number(completion), final_number(gold)) {
        (None, _) => Outcome::Unparsable,
        (Some(answer), Some(gold)) if answer.same(&gold) => Outcome::Right,
        _ => Outcome::Wrong,
    }
}

/// The number right after the last `####` that has one.
fn after_hashes(text: &[u8]) -> Option<Number> {
    let is_mark = |at: &usize| text[*at..].starts_with(b"####");
    let marks = (0..text.len()).rev().filter(is_mark);
    let mut numbers = marks.filter_map(|at| number_at(text, skip_dressing(text, at + 4)));
    let found = numbers.find(|found| !is_list_item(&text[found.end..]))?;
    Some(result(text, found).number)
}

/// Whether what follows a number makes it the number of a heading: `1. Find the price`.
fn is_list_item(rest: &[u8]) -> bool {
    let [b'.' | b')' | b':', rest @ ..] = rest else { return false };
    let mut letters = rest.iter().skip_while(|byte| **byte == b' ');
    letters.next().is_some_and(u8::is_ascii_alphabetic)
}

/// The one number of a box or tag: the first after the last `=`, unless it is only a part of a
/// list, sum or product.
fn enclosed(inside: &str) -> Option<Number> {
    if IRRATIONAL.iter().any(|sign| inside.contains(sign)) {
        return None;
    }
    let sides = inside.rsplit('=');
    let mut found = sides.filter_map(|side| Some((side, next_number(side.as_bytes(), 0)?)));
    let (side, found) = found.next()?;
    let rest = side.as_bytes().get(found.end..).unwrap_or_default();
    let mut rest = rest.iter().filter(|byte| !byte.is_ascii_whitespace());
    let goes_on = rest.next().is_some_and(|byte| b"+-*/^,".contains(byte))
        && rest.next().is_some_and(|byte| byte.is_ascii_digit() || b"\\$(".contains(byte));
    (!goes_on).then_some(found.number)
}

/// The number stated after "answer is" or "answer:": right there, or in the rest of the line's
/// sentence.
fn stated(after: &str) -> Option<Number> {
    let text = after.as_bytes();
    let start = skip_dressing(text, 0);
    let rest = &after[start..];
    let end = rest.find('\n').into_iter().chain(rest.find(". ")).min();
    let sentence = &text[..start + end.unwrap_or(rest.len())];
    let found = next_number(sentence, start)?;
    Some(result(sentence, found).number)
}

/// The last number of a text.
fn last_number(text: &[u8]) -> Option<Number> {
    let first = next_number(text, 0);
    std::iter::successors(first, |found| next_number(text, found.end)).last().map(|f| f.number)
}

/// Follows `9 * 2 = 18` from the 9 to the 18.
fn result(text: &[u8], first: Found) -> Found {
    let mut found = first;
    loop {
        let is_sum = |at: &usize| is_arithmetic(text, *at);
        let equals = (found.end..text.len()).find(|at| !is_sum(at)).unwrap_or(text.len());
        if text.get(equals) != Some(&b'=') {
            return found;
        }
        let spaces = text[equals + 1..].iter().take_while(|byte| **byte == b' ').count();
        match number_at(text, equals + 1 + spaces) {
            Some(next) => found = next,
            None => return found,
        }
    }
}

/// Whether the byte can stand in a sum: digits, operators, spaces, and points within numbers.
fn is_arithmetic(text: &[u8], at: usize) -> bool {
    match text[at] {
        b'.' | b',' => text.get(at + 1).is_some_and(u8::is_ascii_digit),
        byte => byte.is_ascii_digit() || b" +-*/()$%x".contains(&byte),
    }
}

/// The place after white space, emphasis, brackets and maths delimiters.
fn skip_dressing(text: &[u8], from: usize) -> usize {
    let mut at = from;
    while let Some(byte) = text.get(at) {
        let opens_maths = *byte == b'\\' && matches!(text.get(at + 1), Some(b'(' | b'['));
        let is_dressing = byte.is_ascii_whitespace() || b":*_([{$=~\"'".contains(byte);
        if !opens_maths && !is_dressing {
            break;
        }
        at += 1;
    }
    at
}
