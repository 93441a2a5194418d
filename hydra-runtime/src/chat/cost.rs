//! What values and the work on them cost, and how much of each is too much.

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind, State};

/// Bytes that a template may write.
pub(super) const MOST_TEXT: usize = 64 << 20;
/// Values in a value, and its own, and the bytes of their strings.
const MOST_VALUES: usize = 100_000;
const MOST_BYTES: usize = 64 << 20;
/// Lists in lists.
const MOST_DEPTH: usize = 64;
/// Digits of a width in a format, and the bytes that a field with such a width takes besides what is put there.
const MOST_DIGITS: usize = 4;
const FIELD: usize = 1_000;

pub(super) fn refused(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what.into())
}

/// Pays for looking at all of a value.
pub(super) fn pay_for_looks(state: &State, value: &Value) -> Result<(), Error> {
    let mut size = Size::default();
    size.add(value, 0)?;
    size.pay(state)?;
    state.consume_fuel(size.bytes as u64 / 64)
}

/// Pays for looking at two values until one ends.
pub(super) fn pay_for_either(state: &State, value: &Value, other: &Value) -> Result<(), Error> {
    match (value.as_str(), other.as_str()) {
        (Some(value), Some(other)) => state.consume_fuel(value.len().min(other.len()) as u64 / 64),
        (None, None) if value.as_object().is_some() && other.as_object().is_some() => {
            pay_for_looks(state, value)?;
            pay_for_looks(state, other)
        }
        _ => Ok(()),
    }
}

/// Pays for comparing each of some values with several others.
pub(super) fn pay_for_order(state: &State, values: &Value) -> Result<(), Error> {
    let mut size = Size::default();
    size.add(values, 0)?;
    state.consume_fuel(size.values as u64 + size.bytes as u64 / 8)
}

/// Looks at each character of a text for each of the characters to leave out.
pub(super) fn pay_for_trim(state: &State, text: &str, of: Option<&str>) -> Result<(), Error> {
    state.consume_fuel((text.len() as u64).saturating_mul(of.map_or(1, str::len) as u64) / 256)
}

/// Fails if a text has too many parts.
pub(super) fn few_parts(text: &str, by: Option<&str>, most: Option<i64>) -> Result<(), Error> {
    let most = most.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX);
    match by {
        _ if most <= MOST_VALUES => Ok(()),
        Some(by) => few(text.split(by)),
        None => few(text.split(is_space).filter(|word| !word.is_empty())),
    }
}

/// What `str.isspace` takes for white space.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// Fails if there are too many parts of a text.
pub(super) fn few<T>(mut parts: impl Iterator<Item = T>) -> Result<(), Error> {
    match parts.nth(MOST_VALUES) {
        Some(_) => Err(refused(format!("a text of more than {MOST_VALUES} parts"))),
        None => Ok(()),
    }
}

/// Fails if `format` may write too much, and pays for it: each of its fields, which begin with `sign`, as if it had the largest
/// width and the longest argument.
pub(super) fn pay_for_format(state: &State, format: &str, sign: char, arguments: &[Value]) -> Result<(), Error> {
    let numbers = || format.split(|c: char| !c.is_ascii_digit());
    if numbers().any(|number| number.len() > MOST_DIGITS) {
        return Err(refused(format!("a format of more than {MOST_DIGITS} digits")));
    }
    let width = numbers().filter_map(|number| number.parse::<usize>().ok()).max().unwrap_or(0);
    let mut longest = 0;
    for argument in arguments {
        let mut size = Size::default();
        size.add(argument, 0)?;
        // Lists and maps are written with their texts in quotes.
        let shown = if argument.as_object().is_some() { size.bytes * 8 + size.values * 64 } else { size.bytes };
        longest = longest.max(shown);
    }
    let signs = format.matches(sign).count() - format.matches(&*format!("{sign}{sign}")).count();
    let most = signs.saturating_mul(FIELD + 4 * width + longest).saturating_add(format.len());
    if most > MOST_TEXT {
        return Err(refused(format!("a format that may write more than {} MiB", MOST_TEXT >> 20)));
    }
    state.consume_fuel(most as u64 / 64)
}

/// Fails if a value is too large or too deep, and pays for looking at it.
pub(super) fn measure(state: &State, value: &Value) -> Result<(), Error> {
    let mut size = Size::default();
    size.add(value, 0)?;
    size.pay(state)
}

/// What there is in a value, and its own.
#[derive(Default)]
pub(super) struct Size {
    values: usize,
    bytes: usize,
    /// Whether some are no texts, numbers, lists or maps.
    pub objects: bool,
}

impl Size {
    pub fn pay(&self, state: &State) -> Result<(), Error> {
        state.consume_fuel(self.values as u64 / 16 + self.bytes as u64 / 1024)
    }

    /// Adds a value that is in so many lists and maps. Fails if that is too much, or a namespace is within one.
    pub fn add(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        self.values += 1;
        self.bytes = self.bytes.saturating_add(value.as_str().map_or(0, str::len));
        if self.values > MOST_VALUES || self.bytes > MOST_BYTES {
            let (values, mib) = (MOST_VALUES, MOST_BYTES >> 20);
            return Err(refused(format!("a list or map of more than {values} values or {mib} MiB")));
        }
        if depth > MOST_DEPTH {
            return Err(refused(format!("a list or map that is nested more than {MOST_DEPTH} times")));
        }
        if depth > 0 && is_namespace(value) {
            return Err(refused("a namespace in a list or map"));
        }
        self.objects |= value.kind() == ValueKind::Plain;
        match value.kind() {
            ValueKind::Map => value.try_iter()?.checked().try_for_each(|key| {
                let key = key?;
                self.add(&key, depth + 1)?;
                self.add(&value.get_item(&key)?, depth + 1)
            }),
            ValueKind::Seq | ValueKind::Iterable => {
                value.try_iter()?.checked().try_for_each(|item| self.add(&item?, depth + 1))
            }
            _ => Ok(()),
        }
    }
}

/// Whether it is one of `namespace()`.
pub(super) fn is_namespace(value: &Value) -> bool {
    value.as_object().is_some_and(|object| object.type_name().ends_with("Namespace"))
}
