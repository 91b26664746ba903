//! The grammar of numbers in running text.
//!
//! ```text
//! number   := sign? currency? sign? body percent?
//! body     := fraction | whole (' ' proper | ' '? fraction) | decimal ('/' decimal)?
//! fraction := \frac{decimal}{decimal} | \frac12
//! proper   := digits '/' digits, smaller than 1
//! decimal  := (digits | d{1,3}(,ddd)+)? ('.' digits)? (e sign? digits)?
//! ```
//! Text is read after `tidy`, so that one spelling of each sign is enough. What follows a
//! number (units, a full stop, emphasis) is not part of it.

use crate::ratio::Value;

/// A number as it was written.
#[derive(Clone, Copy, Debug)]
pub struct Number {
    value: Value,
    percent: bool,
}

impl Number {
    /// Whether both mean the same number. Values are compared exactly (as fractions of 128-bit
    /// integers; up to a relative 1e-6 where those overflow): 0.5 is 1/2, but 0.33 is not 1/3.
    ///
    /// A percent sign is read in both ways that people use it: `50%` is 50 with a unit as well as
    /// 0.5, so it equals either of them, while `50%` and `0.5%` differ.
    pub fn same(&self, other: &Number) -> bool {
        let share = |number: &Number| {
            let hundred = Value::Exact(100, 1);
            if number.percent { number.value.over(hundred) } else { Some(number.value) }
        };
        let shares = share(self).zip(share(other));
        self.value.same(other.value)
            || self.percent != other.percent && shares.is_some_and(|(a, b)| a.same(b))
    }

    /// The nearest f64; a percent sign leaves the written number.
    pub fn as_f64(&self) -> f64 {
        self.value.as_f64()
    }
}

/// A number and the byte after it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found {
    pub end: usize,
    pub number: Number,
}

/// The first number that begins at `from` or later.
pub(crate) fn next_number(text: &[u8], from: usize) -> Option<Found> {
    let mut at = from;
    while at < text.len() {
        match read(text, at) {
            Some((end, Some(number))) => return Some(Found { end, number }),
            Some((end, None)) => at = end,
            None => at += 1,
        }
    }
    None
}

/// The number that begins exactly at `at`.
pub(crate) fn number_at(text: &[u8], at: usize) -> Option<Found> {
    let (end, number) = read(text, at)?;
    Some(Found { end, number: number? })
}

/// Reads what looks like a number at `at`: where it ends, and the number unless it is a division
/// by zero, a date, a power or beyond all bounds.
fn read(text: &[u8], at: usize) -> Option<(usize, Option<Number>)> {
    let before = at.checked_sub(1).map_or(b' ', |i| text[i]);
    let glued = before.is_ascii_alphanumeric() || b")}]".contains(&before);
    let (mut at, mut negative) = sign(text, at, glued);
    if peek(text, at) == b'$' {
        at += 1;
        let inner = sign(text, at, negative.is_some());
        (at, negative) = (inner.0, negative.or(inner.1));
    }
    if peek(text, at) == b'.' && glued {
        return None;
    }
    let (end, mut value) = body(text, at)?;
    let (end, spoiled) = tail(text, end);
    if spoiled {
        value = None;
    }
    let unit = skip_spaces(text, end);
    let percent = text[unit..].starts_with(b"%") || text[unit..].starts_with(b"percent");
    let end = if peek(text, unit) == b'%' { unit + 1 } else { end };
    let signed = |value: Value| if negative == Some(true) { value.negated() } else { value };
    Some((end, value.map(|value| Number { value: signed(value), percent })))
}

/// Skips a sign; says whether it was a minus. A dash glued to a word or number is none.
fn sign(text: &[u8], at: usize, glued: bool) -> (usize, Option<bool>) {
    match peek(text, at) {
        b'-' if !glued => (at + 1, Some(true)),
        b'+' if !glued => (at + 1, Some(false)),
        _ => (at, None),
    }
}

/// Whether a power (`^5`) or a second stroke (`3/4/2025`) follows, which make it no number.
fn tail(text: &[u8], at: usize) -> (usize, bool) {
    let next = peek(text, at + 1);
    match peek(text, at) {
        b'^' if next.is_ascii_digit() => (digits(text, at + 1), true),
        b'^' if next == b'{' && matches!(peek(text, at + 2), b'0'..=b'9' | b'-') => {
            (digits(text, at + 3), true)
        }
        b'/' if next.is_ascii_digit() => (digits(text, at + 1), true),
        _ => (at, false),
    }
}

/// A fraction, mixed number or decimal: its end, and its value if it has one.
fn body(text: &[u8], at: usize) -> Option<(usize, Option<Value>)> {
    if let Some(found) = latex_fraction(text, at) {
        return Some(found);
    }
    let (end, value) = decimal(text, at)?;
    let next = skip_spaces(text, end);
    let whole = text[at..end].iter().all(|byte| byte.is_ascii_digit() || *byte == b',');
    let part = latex_fraction(text, next)
        .or_else(|| if next > end { stroke_fraction(text, next) } else { None });
    if let (true, Some((part_end, part))) = (whole, part)
        && part.is_none_or(|part| part.as_f64() < 1.0)
    {
        return Some((part_end, value.zip(part).and_then(|(a, b)| a.plus(b))));
    }
    Some(stroke_fraction(text, at).unwrap_or((end, value)))
}

/// `a/b`, with at most a space around the stroke.
fn stroke_fraction(text: &[u8], at: usize) -> Option<(usize, Option<Value>)> {
    let (end, numerator) = decimal(text, at)?;
    let stroke = skip_spaces(text, end);
    let below = skip_spaces(text, stroke + 1);
    if peek(text, stroke) != b'/' {
        return None;
    }
    let (end, denominator) = decimal(text, below)?;
    Some((end, numerator.zip(denominator).and_then(|(a, b)| a.over(b))))
}

/// `\frac{a}{b}` or `\frac12`.
fn latex_fraction(text: &[u8], at: usize) -> Option<(usize, Option<Value>)> {
    const NAME: &[u8] = br"\frac";
    let at = text.get(at..)?.starts_with(NAME).then_some(at + NAME.len())?;
    let (end, numerator) = latex_argument(text, at)?;
    let (end, denominator) = latex_argument(text, end)?;
    Some((end, numerator.zip(denominator).and_then(|(a, b)| a.over(b))))
}

/// `{decimal}` with an optional sign, or one digit.
fn latex_argument(text: &[u8], at: usize) -> Option<(usize, Option<Value>)> {
    let first = peek(text, at);
    if first.is_ascii_digit() {
        return Some((at + 1, Value::fraction(i128::from(first - b'0'), 1)));
    }
    let at = (first == b'{').then(|| skip_spaces(text, at + 1))?;
    let (at, negative) = sign(text, at, false);
    let (end, value) = decimal(text, at)?;
    let end = skip_spaces(text, end);
    let value = if negative == Some(true) { value.map(Value::negated) } else { value };
    (peek(text, end) == b'}').then_some((end + 1, value))
}

/// Digits with thousands commas, decimals and an exponent: the end, and the value if it is finite.
fn decimal(text: &[u8], at: usize) -> Option<(usize, Option<Value>)> {
    let whole_end = thousands(text, at);
    let mut end = whole_end;
    if peek(text, end) == b'.' && peek(text, end + 1).is_ascii_digit() {
        end = digits(text, end + 1);
    }
    if end == at {
        return None;
    }
    let is_digit = |byte: &&u8| byte.is_ascii_digit();
    let written: String =
        text[at..end].iter().filter(is_digit).map(|byte| char::from(*byte)).collect();
    let places = text[whole_end..end].iter().filter(is_digit).count();
    let (end, power) = exponent(text, end);
    let scale = i32::try_from(places).ok().zip(power).map(|(places, power)| power - places);
    Some((end, scale.and_then(|scale| Value::decimal(&written, scale))))
}

/// The end of the digits at `at`, with commas that part groups of three.
fn thousands(text: &[u8], at: usize) -> usize {
    let mut end = digits(text, at);
    if !(1..=3).contains(&(end - at)) {
        return end;
    }
    while peek(text, end) == b',' && digits(text, end + 1) == end + 4 {
        end += 4;
    }
    end
}

/// `e-5` and the like: the end, and the power of ten (0 without one, none if out of bounds).
fn exponent(text: &[u8], at: usize) -> (usize, Option<i32>) {
    if !matches!(peek(text, at), b'e' | b'E') {
        return (at, Some(0));
    }
    let (start, negative) = sign(text, at + 1, false);
    let end = digits(text, start);
    if end == start || peek(text, end).is_ascii_alphanumeric() {
        return (at, Some(0));
    }
    let written = std::str::from_utf8(&text[start..end]).unwrap_or_default();
    let power = written.parse().ok().filter(|power: &i32| *power <= 1000);
    (end, power.map(|power| if negative == Some(true) { -power } else { power }))
}

/// The end of the run of digits at `at`.
fn digits(text: &[u8], at: usize) -> usize {
    let run = text.iter().skip(at).take_while(|byte| byte.is_ascii_digit());
    at + run.count()
}

/// The place after at most two spaces.
fn skip_spaces(text: &[u8], at: usize) -> usize {
    let run = text.iter().skip(at).take(2).take_while(|byte| **byte == b' ');
    (at + run.count()).min(text.len())
}

/// The byte at `at`, or 0 beyond the end.
fn peek(text: &[u8], at: usize) -> u8 {
    text.get(at).copied().unwrap_or(0)
}
