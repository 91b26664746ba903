//! How a built-in reward is written: `name`, or `name(key=value, key="text, with commas")`.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::str::FromStr;

/// A reward's name and its options.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Spec {
    pub(crate) name: String,
    options: BTreeMap<String, String>,
}

impl Spec {
    /// Reads a spec. In a quoted value `\"` and `\\` stand for `"` and `\`.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let Some((name, rest)) = text.split_once('(') else {
            return Ok(Spec { name: text.to_string(), options: BTreeMap::new() });
        };
        let inside = rest
            .strip_suffix(')')
            .ok_or_else(|| format!("{text}: a bracket is open; write name(key=value, …)"))?;
        let mut options = BTreeMap::new();
        let mut left = inside.trim();
        while !left.is_empty() {
            let (key, after) =
                left.split_once('=').ok_or_else(|| format!("{text}: {left} is no key=value"))?;
            let (value, after) =
                value(after.trim_start()).map_err(|why| format!("{text}: {why}"))?;
            let key = key.trim().to_string();
            if options.insert(key.clone(), value).is_some() {
                return Err(format!("{text}: {key} is given twice"));
            }
            left = match after.trim_start() {
                "" => "",
                more => more
                    .strip_prefix(',')
                    .ok_or_else(|| format!("{text}: wanted a comma before {more}"))?
                    .trim_start(),
            };
        }
        Ok(Spec { name: name.trim().to_string(), options })
    }

    /// Takes an option's value out, or its default.
    pub(crate) fn take<T: FromStr<Err: Display>>(
        &mut self,
        key: &str,
        default: T,
    ) -> Result<T, String> {
        Ok(self.take_option(key)?.unwrap_or(default))
    }

    /// Takes an option's value out, if it is given.
    pub(crate) fn take_option<T: FromStr<Err: Display>>(
        &mut self,
        key: &str,
    ) -> Result<Option<T>, String> {
        let Some(text) = self.options.remove(key) else { return Ok(None) };
        let name = &self.name;
        text.parse().map(Some).map_err(|error| format!("{name}: {key} = {text}: {error}"))
    }

    /// Refuses options that nobody took; `known` are those that there are.
    pub(crate) fn finish(self, known: &[&str]) -> Result<(), String> {
        let Some(key) = self.options.keys().next() else { return Ok(()) };
        let (name, near) = (&self.name, nearest(key, known.iter().copied()));
        Err(match (known.is_empty(), near) {
            (true, _) => format!("{name} has no options, and {key} was given"),
            (_, Some(near)) => format!("{name} has no option {key}; did you mean {near}?"),
            (_, None) => format!("{name} has no option {key}; it has {}", known.join(", ")),
        })
    }
}

/// A value and what follows it.
fn value(text: &str) -> Result<(String, &str), String> {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find(',').unwrap_or(text.len());
        return Ok((text[..end].trim_end().to_string(), &text[end..]));
    };
    let mut value = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Ok((value, &quoted[at + 1..])),
            '\\' => match chars.next() {
                Some((_, escaped @ ('"' | '\\'))) => value.push(escaped),
                // as regular expressions want it
                Some((_, other)) => value.extend(['\\', other]),
                None => break,
            },
            c => value.push(c),
        }
    }
    Err("a quote is open".to_string())
}

/// The known word nearest to a misspelt one, if any is near.
pub(crate) fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let distance = |known: &str| strsim::damerau_levenshtein(word, known);
    let near = |known: &&str| distance(known) <= 2 + known.len() / 8 || known.starts_with(word);
    known.filter(near).min_by_key(|known| distance(known))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn spec(text: &str) -> Spec {
        Spec::parse(text).unwrap()
    }

    #[test]
    fn names_options_and_quotes_are_read() {
        let mut spec = spec(r#" regex_reward ( pattern = "^\d+, \"x\"$" , value=2.5 ) "#);
        assert_eq!(spec.name, "regex_reward");
        assert_eq!(spec.take("pattern", String::new()).unwrap(), r#"^\d+, "x"$"#);
        assert_eq!(spec.take("value", 1.0).unwrap(), 2.5);
        assert_eq!(spec.take("other", 7).unwrap(), 7);
        spec.finish(&[]).unwrap();
    }

    #[test]
    fn mistakes_are_named() {
        for (text, wanted) in [
            ("a(b=1", "a bracket is open"),
            ("a(b)", "b is no key=value"),
            ("a(b=\"1)", "a quote is open"),
            ("a(b=1, b=2)", "b is given twice"),
            ("a(b=\"1\" c=2)", "wanted a comma before c=2"),
        ] {
            let error = Spec::parse(text).unwrap_err();
            assert!(error.contains(wanted), "{error}");
        }
        let mut bad = spec("a(ngram=x)");
        assert!(bad.take("ngram", 3).unwrap_err().starts_with("a: ngram = x: invalid digit"));
        let error = spec("a(ngarm=1)").finish(&["ngram"]).unwrap_err();
        assert_eq!(error, "a has no option ngarm; did you mean ngram?");
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            name in "[a-z_]{1,9}",
            options in prop::collection::btree_map("[a-z_]{1,9}", "[ -~]{0,12}", 0..4),
        ) {
            let quoted = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"");
            let pairs: Vec<String> =
                options.iter().map(|(key, text)| format!("{key}=\"{}\"", quoted(text))).collect();
            let spec = Spec::parse(&format!("{name}({})", pairs.join(", "))).unwrap();
            prop_assert_eq!(spec, Spec { name, options });
        }

        #[test]
        fn any_text_is_a_spec_or_a_mistake(text in "\\PC{0,30}") {
            let _ = Spec::parse(&text);
        }
    }
}
