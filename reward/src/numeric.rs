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
/// 3. after the last "answer is" (in the same sentence) or "answer:" (at once), if a number follows;
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
    let phrase = place::after_phrase(&text).and_then(|after| {
        let before = &text[..text.len() - after.len()];
        stated(after.as_bytes(), before.ends_with(':'))
    });
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
    let goes_on = rest.next().is_some_and(|byte| b"+-*/^,:".contains(byte))
        && rest.next().is_some_and(|byte| byte.is_ascii_digit() || b"\\$(".contains(byte));
    (!goes_on).then_some(found.number)
}

/// The number stated after "answer is" (within its sentence) or "answer:" (right there, since
/// `Answer: Tom has 3 …` opens a solution).
fn stated(after: &[u8], opens: bool) -> Option<Number> {
    let start = skip_dressing(after, 0);
    let is_end = |at: &usize| after[*at] == b'\n' || after[*at..].starts_with(b". ");
    let end = (start..after.len()).find(is_end).unwrap_or(after.len());
    let sentence = &after[..end];
    let found = if opens { number_at(sentence, start) } else { next_number(sentence, start) };
    found.map(|found| result(sentence, found).number)
}

/// The last number of a text.
fn last_number(text: &[u8]) -> Option<Number> {
    let first = next_number(text, 0);
    std::iter::successors(first, |found| next_number(text, found.end)).last().map(|f| f.number)
}

/// Follows `9 * 2 = 18` from the 9 to the 18; `18 = 9 * 2` stays at the 18.
fn result(text: &[u8], first: Found) -> Found {
    let mut found = first;
    loop {
        let is_sum = |at: &usize| is_arithmetic(text, *at);
        let equals = (found.end..text.len()).find(|at| !is_sum(at)).unwrap_or(text.len());
        let calculates = text[found.end..equals].iter().any(|byte| b"+-*/x".contains(byte));
        if !calculates || text.get(equals) != Some(&b'=') {
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn assert_reads(text: &str, gold: &str) {
        assert_eq!(grade(text, gold), Outcome::Right, "{text:?} should come to {gold}");
    }

    #[test]
    fn places_are_looked_at_in_order() {
        assert_reads(r"\boxed{1} <answer>2</answer> the answer is 3. 4 #### 5 then 6", "5");
        assert_reads(r"<answer>2</answer> the answer is 3. \boxed{1} 4", "1");
        assert_reads("the answer is 3. <answer>2</answer> 4", "2");
        assert_reads("The Answer is 3. That is 4 less than 7.", "3");
        assert_reads("She has 9 eggs and sells them for $18.", "18");
        assert_reads("<think>It may be 5</think> 6 #### 7", "7");
    }

    #[test]
    fn headings_and_openings_are_no_answers() {
        assert_reads("#### Step 2\nso \\boxed{18}", "18");
        assert_reads("#### 1. Find it\n9 * 2 = 18", "18");
        assert_reads("Answer: She sells 48/2 = 24 in May.", "24");
        assert_reads("Answer: She sells 48/2 = 24 in May. In all she sells 48 + 24 = 72.", "72");
        assert_reads("The answer is therefore 18 eggs, 2 more.\nRight?", "18");
        assert_reads("The answer is clear.\nShe has 18", "18");
    }

    #[test]
    fn results_of_calculations_count() {
        for text in ["#### 9 * 2 = 18", "#### 18 = 9 * 2", "answer is 16 + $2.00 = $18 a day"] {
            assert_reads(text, "18");
        }
        assert_reads(r"\boxed{x = 18}", "18");
        assert_reads(r"Answer: \( 9 \times 2 = 18 \)", "18");
    }

    #[test]
    fn numbers_are_read_as_people_write_them() {
        let thousands = ["1,234,567", "$1,234,567.00", "1{,}234{,}567", r"1\,234\,567 dollars"];
        for text in thousands.iter().chain(&["1234567.", "+1234567", "1.234567e6", "**1,234,567**"])
        {
            assert_reads(text, "1234567");
        }
        for text in ["-2.5", "−2.5", "-$2.50", "$-2.5", "-5/2", "-2 1/2", r"-2\frac{1}{2}"] {
            assert_reads(text, "-2.5");
        }
        for text in [r"$\frac{3}{4}$", r"\dfrac34", "3/4", "3 / 4 cup", ".75", "0.750", "75e-2"] {
            assert_reads(text, "0.75");
            assert_reads(&format!(r"So \boxed{{{text}}}."), "3/4");
        }
        assert_reads("€18", "18");
        assert_reads("£18", "18");
        assert_reads("16-3", "3");
    }

    #[test]
    fn percent_reads_both_ways_but_not_mixed_up() {
        for gold in ["50", "0.5", "50%", "1/2"] {
            assert_reads(r"\boxed{50\%}", gold);
        }
        assert_reads("50", "50%");
        assert_eq!(grade("50%", "0.5%"), Outcome::Wrong);
        assert_eq!(grade("5%", "50"), Outcome::Wrong);
    }

    #[test]
    fn near_misses_are_wrong() {
        let pairs =
            [("0.33", "1/3"), ("18.01", "18"), ("-18", "18"), ("1,234", "1"), ("1.5", "15")];
        for (text, gold) in pairs {
            assert_eq!(grade(text, gold), Outcome::Wrong, "{text} against {gold}");
        }
    }

    #[test]
    fn what_is_no_number_is_unparsable() {
        let boxes = [r"\boxed{}", r"\boxed{2\sqrt{3}}", r"\boxed{3, 5}", r"\boxed{2 \cdot 3}"];
        let others = ["", "I do not know", "5/0", "2^10", "12/25/2025", "5 so \\boxed{none}"];
        for text in boxes.iter().chain(&others) {
            assert_eq!(grade(text, "2"), Outcome::Unparsable, "{text}");
        }
    }

    #[test]
    fn long_texts_are_graded_in_linear_time() {
        let pieces = ["9", "1,", "1/", "#### ", "####1. a", r"\boxed{", "answer is ", r"\frac{1}"];
        let start = std::time::Instant::now();
        for piece in pieces.iter().chain(&["-$", "1 1/", "<answer>", "9e", "{", "$", "= 1+"]) {
            let text = piece.repeat(200_000);
            assert_ne!(grade(&text, "18"), Outcome::Right, "{piece}");
        }
        assert!(start.elapsed().as_secs() < 60, "took {:?}", start.elapsed());
    }

    /// Texts that say a number, given as written.
    fn sayings(number: &str) -> [String; 9] {
        [
            number.to_string(),
            format!("2 + 2 is 4.\n#### {number}"),
            format!(r"7 so \boxed{{{number}}}."),
            format!("<think>1</think><answer> {number} </answer>"),
            format!("The answer is {number}."),
            format!("**Answer:** ${number}$"),
            format!("From 12 she keeps {number} apples."),
            format!("The final answer is: **{number}**"),
            format!("#### ${number} each"),
        ]
    }

    fn with_commas(n: i64) -> String {
        let digits = n.unsigned_abs().to_string();
        let mut out = String::new();
        for (i, digit) in digits.chars().enumerate() {
            if i > 0 && (digits.len() - i).is_multiple_of(3) {
                out.push(',');
            }
            out.push(digit);
        }
        if n < 0 { format!("-{out}") } else { out }
    }

    fn assert_grades(written: &str, gold: &str, other: &str) -> Result<(), TestCaseError> {
        for text in sayings(written) {
            prop_assert_eq!(grade(&text, gold), Outcome::Right, "{} against {}", &text, gold);
            prop_assert_eq!(grade(&text, other), Outcome::Wrong, "{} against {}", &text, other);
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn integers_grade_right_however_written(n in any::<i64>(), step in 1i64..1000) {
            let (gold, other) = (n.to_string(), (i128::from(n) + i128::from(step)).to_string());
            let unicode = gold.replace('-', "\u{2212}");
            for written in [gold.clone(), with_commas(n), format!("{n}.00"), unicode] {
                assert_grades(&written, &gold, &other)?;
            }
        }

        #[test]
        fn decimals_grade_right_however_written(n in -999_999i64..999_999, places in 1u32..6) {
            let sign = if n < 0 { "-" } else { "" };
            let unit = 10i64.pow(places);
            let (whole, part) = (n.abs() / unit, n.abs() % unit);
            let gold = format!("{sign}{whole}.{part:0width$}", width = places as usize);
            let other = format!("{gold}1");
            let frac = format!(r"{sign}\frac{{{}}}{{{unit}}}", n.abs());
            for written in [gold.clone(), format!("{gold}000"), format!("{n}/{unit}"), frac] {
                assert_grades(&written, &gold, &other)?;
            }
        }

        #[test]
        fn mixed_numbers_grade_right(whole in 0u32..9999, a in 1u32..98, more in 1u32..9) {
            let b = a + more;
            let gold = format!("{}/{b}", whole * b + a);
            let other = format!("{}/{b}", whole * b + a + 1);
            let latex = format!(r"{whole}\frac{{{a}}}{{{b}}}");
            for written in [gold.clone(), format!("{whole} {a}/{b}"), latex] {
                assert_grades(&written, &gold, &other)?;
            }
        }

        #[test]
        fn any_text_is_graded_without_panic(
            text in r"(\PC|[0-9]{1,40}|[-−+$€.,/%^={}e]|####|\\boxed\{|\\frac|answer:){0,30}",
            gold in r"[-0-9./%]{0,8}",
        ) {
            let _ = grade(&text, &gold);
        }
    }
}
