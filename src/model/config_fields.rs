//! Typed look-ups into a JSON object, with errors that name the key.

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// A JSON object and the typed look-ups into it; `null` is told apart from absent where it matters.
pub(crate) struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    pub(crate) fn new(value: &'a Value) -> Result<Self> {
        let object = value.as_object();
        object.map(Fields).ok_or_else(|| Error::usage("expected a JSON object"))
    }

    /// The value if present and not null.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    /// Present, even as null.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.0.contains_key(key)
    }

    pub(crate) fn keys(&self) -> impl Iterator<Item = &'a str> {
        self.0.keys().map(String::as_str)
    }

    /// A whole number below two thousand million: no product of two sizes overflows.
    pub(crate) fn size(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a whole number", |value| {
            let whole = |x: &f64| x.fract() == 0.0 && (0.0..2e9).contains(x);
            value.as_f64().filter(whole).map(|x| x as usize)
        })
    }

    pub(crate) fn number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", Value::as_f64)
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.typed(key, "a string", Value::as_str)
    }

    pub(crate) fn flag(&self, key: &str, default: bool) -> Result<bool> {
        Ok(self.typed(key, "true or false", Value::as_bool)?.unwrap_or(default))
    }

    /// A nested object; an empty one counts as absent.
    pub(crate) fn object(&self, key: &str) -> Result<Option<Fields<'a>>> {
        let object = self.typed(key, "an object", Value::as_object)?;
        Ok(object.filter(|object| !object.is_empty()).map(Fields))
    }

    fn typed<T>(
        &self,
        key: &str,
        kind: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let wrong = || Error::usage(format!("'{key}' must be {kind}, found {value}"));
        read(value).map(Some).ok_or_else(wrong)
    }

    /// Refuses the first of `keys` that is set to something other than false, 0 or nothing.
    pub(crate) fn refuse(&self, keys: &[&str]) -> Result<()> {
        let off = |value: &Value| match value {
            Value::Bool(flag) => !flag,
            Value::Number(number) => number.as_f64() == Some(0.0),
            Value::Array(items) => items.is_empty(),
            Value::Object(items) => items.is_empty(),
            _ => false,
        };
        match keys.iter().find(|key| self.get(key).is_some_and(|value| !off(value))) {
            Some(key) => Err(Error::usage(format!("'{key}' is set, which is not supported"))),
            None => Ok(()),
        }
    }
}
