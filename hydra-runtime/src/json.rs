//! JSON objects whose wrong entries are named: file, key, what was wanted, what was found.

use crate::error::printable;
use crate::{Error, Result, files};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// An object of a file; `null` counts as absent.
pub(crate) struct Object {
    path: PathBuf,
    /// The keys that lead to it, each with a dot.
    prefix: String,
    pub map: Map<String, Value>,
}

impl Object {
    pub fn read(path: &Path) -> Result<Self> {
        Self::parse(path, &files::read(path)?)
    }

    /// From a file's bytes; `path` is for messages.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let invalid = |message| Error::Format { path: path.into(), offset: None, message };
        let value = serde_json::from_slice(bytes).map_err(|e| invalid(format!("not JSON: {e}")))?;
        match value {
            Value::Object(map) => Ok(Self { path: path.into(), prefix: String::new(), map }),
            _ => Err(invalid("wanted a JSON object".into())),
        }
    }

    pub fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub fn error(&self, message: impl Into<String>) -> Error {
        Error::Config { path: self.path.clone(), message: message.into() }
    }

    /// "key is .., wanted ..".
    pub fn refuse(&self, key: &str, wanted: &str) -> Error {
        let found = self.get(key).map_or("missing".into(), |value| format!("is {}", printable(&value.to_string())));
        self.error(format!("{}{key} {found}, wanted {wanted}", self.prefix))
    }

    fn typed<'a, T>(&'a self, key: &str, wanted: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        self.get(key).map(|value| read(value).ok_or_else(|| self.refuse(key, wanted))).transpose()
    }

    pub fn string(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", Value::as_str)
    }

    pub fn boolean(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", Value::as_f64)
    }

    pub fn size(&self, key: &str) -> Result<Option<usize>> {
        let whole = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|&n| n > 0);
        self.typed(key, "a positive whole number", whole)
    }

    /// The same, from 0 on.
    pub fn count(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a whole number", |value| value.as_u64().and_then(|n| usize::try_from(n).ok()))
    }

    pub fn object(&self, key: &str) -> Result<Option<Self>> {
        let map = self.typed(key, "an object", Value::as_object)?;
        let prefix = format!("{}{key}.", self.prefix);
        Ok(map.map(|map| Self { path: self.path.clone(), prefix, map: map.clone() }))
    }

    /// One string or a list of them.
    pub fn strings(&self, key: &str) -> Result<Option<Vec<String>>> {
        let read = |value: &Value| match value {
            Value::String(one) => Some(vec![one.clone()]),
            Value::Array(many) => many.iter().map(|item| item.as_str().map(str::to_owned)).collect(),
            _ => None,
        };
        self.typed(key, "a list of strings", read)
    }

    /// A list of numbers.
    pub fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>> {
        self.typed(key, "a list of numbers", |value| value.as_array()?.iter().map(Value::as_f64).collect())
    }

    /// A token's id or a list of them; empty if absent.
    pub fn token_ids(&self, key: &str) -> Result<Vec<u32>> {
        let id = |value: &Value| value.as_u64().and_then(|n| u32::try_from(n).ok());
        let read = |value: &Value| match value {
            Value::Array(many) => many.iter().map(id).collect(),
            one => id(one).map(|id| vec![id]),
        };
        Ok(self.typed(key, "a token's number or a list of them", read)?.unwrap_or_default())
    }
}

/// The f32 that this is when it is widened, if there is one.
pub(crate) fn narrowed(x: f64) -> Option<f32> {
    Some(x as f32).filter(|&narrow| f64::from(narrow) == x)
}

/// The decimal number that means this f32, without the digits that widening it would add.
pub(crate) fn shortest(x: f32) -> Value {
    x.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}
