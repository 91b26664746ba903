//! One spelling for what models write in several: LaTeX spacing, currency signs, minus signs.

/// Spellings that come to the same for a grader. Longer ones stand before their own beginnings.
const SPELLINGS: [(&str, &str); 31] = [
    (r"\dfrac", r"\frac"),
    (r"\tfrac", r"\frac"),
    (r"\cfrac", r"\frac"),
    (r"\left(", "("),
    (r"\right)", ")"),
    (r"\times", "*"),
    (r"\cdot", "*"),
    (r"\div", "/"),
    (r"\pounds", "$"),
    (r"\euro", "$"),
    (r"\$", "$"),
    (r"\%", "%"),
    (r"\,", ""),
    (r"\!", ""),
    (r"\;", " "),
    (r"\:", " "),
    (r"\ ", " "),
    ("{,}", ","),
    ("€", "$"),
    ("£", "$"),
    ("¥", "$"),
    ("\u{2212}", "-"),
    ("\u{fe63}", "-"),
    ("\u{ff0d}", "-"),
    ("×", "*"),
    ("·", "*"),
    ("÷", "/"),
    ("\u{2044}", "/"),
    ("\u{a0}", " "),
    ("\u{202f}", " "),
    ("\u{2009}", " "),
];

/// The text in one spelling: `$` for every currency, `-` for every minus sign, `\frac` for every
/// fraction, plain operators, and no LaTeX spacing.
pub(crate) fn tidy(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let plain = first.is_ascii() && first != '\\' && first != '{';
        let known = SPELLINGS.iter().filter(|_| !plain);
        let spelling = known.clone().find(|(from, _)| rest.starts_with(from));
        let (taken, put) = match spelling {
            Some((from, to)) => (from.len(), *to),
            None => (first.len_utf8(), &rest[..first.len_utf8()]),
        };
        out.push_str(put);
        rest = &rest[taken..];
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_come_to_one() {
        assert_eq!(tidy(r"€1{,}234 \dfrac12 −5"), r"$1,234 \frac12 -5");
        assert_eq!(tidy(r"\left(3 \times 4\right) = 12\,\%"), "(3 * 4) = 12%");
        assert_eq!(tidy("plain text {a}"), "plain text {a}");
    }
}
