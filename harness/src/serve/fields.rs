//! The fields of a JSON request: each is taken out once, with its type and range; what is left at the end is unknown.

use super::error::{ApiError, Result};
use hydra_runtime::printable;
use serde_json::{Map, Value};
use std::ops::RangeInclusive;

/// An object of a request; `null` counts as absent.
pub struct Fields {
    map: Map<String, Value>,
    /// The keys that lead to it, each with a dot.
    prefix: String,
}

impl Fields {
    /// The body of a request.
    pub fn parse(body: &[u8]) -> Result<Self> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(map)) => Ok(Self { map, prefix: String::new() }),
            Ok(other) => Err(ApiError::invalid(format!("the body: expected a JSON object, found {}", shown(&other)))),
            Err(error) => Err(ApiError::invalid(format!("the body is not JSON: {error}"))),
        }
    }

    /// A part of a request that has to be an object; `name` leads to it.
    pub fn of(value: Value, name: &str) -> Result<Self> {
        match value {
            Value::Object(map) => Ok(Self { map, prefix: format!("{name}.") }),
            other => Err(wrong(name, "an object", &other)),
        }
    }

    /// Takes a field out.
    pub fn take(&mut self, key: &str) -> Option<Value> {
        self.map.remove(key).filter(|value| !value.is_null())
    }

    /// The name of a field in messages: "stream_options.include_usage".
    pub fn name(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    fn typed<T>(&mut self, key: &str, expected: &str, read: impl FnOnce(&Value) -> Option<T>) -> Result<Option<T>> {
        let name = self.name(key);
        self.take(key).map(|value| read(&value).ok_or_else(|| wrong(&name, expected, &value))).transpose()
    }

    /// A string.
    pub fn string(&mut self, key: &str) -> Result<Option<String>> {
        self.typed(key, "a string", |value| value.as_str().map(str::to_owned))
    }

    /// A string that has to be there.
    pub fn required(&mut self, key: &str) -> Result<String> {
        let name = self.name(key);
        self.string(key)?.ok_or_else(|| ApiError::field(name, "missing: expected a string"))
    }

    /// `false` if absent.
    pub fn flag(&mut self, key: &str) -> Result<bool> {
        Ok(self.typed(key, "true or false", Value::as_bool)?.unwrap_or(false))
    }

    /// A number within a range, as `range` names it: "from 0 to 1".
    pub fn number(&mut self, key: &str, range: &str, within: fn(f32) -> bool) -> Result<Option<f32>> {
        let read = |value: &Value| value.as_f64().map(|number| number as f32).filter(|&number| within(number));
        self.typed(key, &format!("a number {range}"), read)
    }

    /// A whole number within a range.
    pub fn count(&mut self, key: &str, range: RangeInclusive<usize>) -> Result<Option<usize>> {
        let expected = match *range.end() {
            usize::MAX => format!("a whole number from {} on", range.start()),
            end => format!("a whole number from {} to {end}", range.start()),
        };
        let whole = |value: &Value| value.as_u64().and_then(|number| usize::try_from(number).ok());
        self.typed(key, &expected, |value| whole(value).filter(|number| range.contains(number)))
    }

    /// A number of likeliest tokens; 0 and, as for vLLM, -1 stand for all.
    pub fn top_k(&mut self, key: &str) -> Result<Option<usize>> {
        let read = |value: &Value| match value.as_i64() {
            Some(-1) => Some(0),
            other => other.and_then(|count| usize::try_from(count).ok()),
        };
        self.typed(key, "a whole number from 1 on, or 0 or -1 for all", read)
    }

    /// A seed: any whole number of 64 bits.
    pub fn seed(&mut self, key: &str) -> Result<Option<u64>> {
        let read = |value: &Value| value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned));
        self.typed(key, "a whole number of 64 bits", read)
    }

    /// A string, or a list of at most `most` of them, none of them empty.
    pub fn strings(&mut self, key: &str, most: usize) -> Result<Vec<String>> {
        let text = |value: &Value| value.as_str().filter(|text| !text.is_empty()).map(str::to_owned);
        let read = |value: &Value| match value {
            Value::Array(many) if many.len() <= most => many.iter().map(text).collect(),
            one => text(one).map(|one| vec![one]),
        };
        let expected = format!("a string that is not empty, or a list of at most {most} of them");
        Ok(self.typed(key, &expected, read)?.unwrap_or_default())
    }

    /// An object; empty if absent.
    pub fn object(&mut self, key: &str) -> Result<Self> {
        let name = self.name(key);
        Self::of(self.take(key).unwrap_or_else(|| Value::Object(Map::new())), &name)
    }

    /// Refuses a field that asks for what the server can't do; values for which `harmless` holds ask for nothing.
    pub fn refuse(&mut self, key: &str, why: &str, harmless: impl FnOnce(&Value) -> bool) -> Result<()> {
        match self.take(key) {
            Some(value) if !harmless(&value) => Err(ApiError::unsupported(&self.name(key), why)),
            _ => Ok(()),
        }
    }

    /// Takes a field of which only some values can be asked for: `values` lists them as JSON.
    pub fn only(&mut self, key: &str, values: &str) -> Result<()> {
        let Some(found) = self.take(key) else { return Ok(()) };
        let allowed: Vec<Value> = serde_json::from_str(&format!("[{values}]")).unwrap_or_default();
        // 0 is 0.0.
        let number = found.as_f64();
        if allowed.iter().any(|value| *value == found || number.is_some() && value.as_f64() == number) {
            return Ok(());
        }
        let problem = format!("expected what asks for nothing ({values}), found {}", shown(&found));
        Err(ApiError::unsupported(&self.name(key), &problem))
    }

    /// Leaves fields out of account that change nothing here.
    pub fn ignore(&mut self, keys: &[&str]) {
        for key in keys {
            self.map.remove(*key);
        }
    }

    /// Refuses what is left: a misspelt option would be ignored otherwise.
    pub fn finish(self) -> Result<()> {
        match self.map.iter().find(|(_, value)| !value.is_null()) {
            Some((key, _)) => {
                let name = printable(&self.name(key));
                Err(ApiError::field(name, "unknown: expected one of the fields that the API has"))
            }
            None => Ok(()),
        }
    }
}

/// A field with a wrong value.
pub fn wrong(name: &str, expected: &str, found: &Value) -> ApiError {
    ApiError::field(name, format!("expected {expected}, found {}", shown(found)))
}

/// A value in a message: short, on one line; of what may be long, only its kind.
fn shown(value: &Value) -> String {
    match value {
        Value::Array(list) => format!("a list of {}", list.len()),
        Value::Object(_) => "an object".into(),
        other => printable(&other.to_string()),
    }
}
