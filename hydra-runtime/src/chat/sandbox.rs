//! Limits for templates, which come with a stranger's model: on the work of a rendering, its text, its values and their nesting.
//!
//! minijinja's fuel bounds instructions and the data that they make. What it can't see are containers that it makes lazily
//! (`[1] * 1000000000`) or recursively (a namespace in itself) and writes out afterwards. `chat/checks.rs` therefore puts one
//! of the two filters of this file around every expression that can make such a value.

use super::checks::{self, BOUNDED, PLAIN};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, ErrorKind, State, filters, functions};
use std::io;

/// Instructions, and for each one 64 bytes of data: a conversation of a thousand turns needs some ten thousand.
const FUEL: u64 = 4_000_000;
/// A macro takes 10 of these.
const RECURSION: usize = 300;
/// Bytes that a template may write.
const MOST_TEXT: usize = 64 << 20;
/// Values in a value, and its own, and the bytes of their strings.
const MOST_VALUES: usize = 100_000;
const MOST_BYTES: usize = 64 << 20;
/// Lists in lists.
const MOST_DEPTH: usize = 64;
/// Digits of a width in a format.
const MOST_DIGITS: usize = 4;
/// Spaces by which `tojson` indents.
const MOST_INDENT: usize = 16;

/// An environment with a template named `name`.
pub(super) fn environment(
    name: &'static str,
    source: &str,
    syntax: SyntaxConfig,
) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(RECURSION);
    environment.add_filter(BOUNDED, bounded);
    environment.add_filter(PLAIN, plain);
    environment.add_filter("string", |state: &State, value: Value| filters::string(state, &bounded(state, value)?));
    environment.add_filter("pprint", |state: &State, value: Value| Ok(filters::pprint(&bounded(state, value)?)));
    environment.add_filter("tojson", tojson);
    environment.add_filter("batch", |state: &State, value: Value, count: usize, fill: Option<Value>| {
        bounded(state, filters::batch(state, value, count, fill)?)
    });
    environment.add_filter("slice", |state: &State, value: Value, count: usize, fill: Option<Value>| {
        bounded(state, filters::slice(state, value, count, fill)?)
    });
    environment.add_function("dict", |state: &State, value: Option<Value>, more: Kwargs| {
        bounded(state, functions::dict(value, more)?)
    });
    environment.add_function("namespace", |state: &State, defaults: Option<ValueOrKwargs>| {
        if let Some(defaults) = &defaults {
            plain(state, defaults.clone().into_value())?;
        }
        functions::namespace(defaults)
    });
    // It writes out all that there is.
    environment.remove_global("debug");
    environment.set_formatter(|out, state, value| {
        if value.as_object().is_some() {
            measure(state, value)?;
        }
        minijinja::escape_formatter(out, state, value)
    });
    let checked = checks::insert(name, source, syntax.clone())?;
    environment.set_syntax(syntax);
    environment.add_template_owned(name, checked)?;
    Ok(environment)
}

/// The text of a template of this environment.
pub(super) fn render(environment: &Environment<'_>, name: &str, context: Value) -> Result<String, Error> {
    let mut text = Text(Vec::new());
    environment.get_template(name)?.render_captured_to(context, &mut text)?;
    Ok(String::from_utf8(text.0).expect("templates write UTF-8"))
}

/// What is written, up to [`MOST_TEXT`].
struct Text(Vec<u8>);

impl io::Write for Text {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MOST_TEXT {
            return Err(io::Error::other(format!("a text of more than {} MiB", MOST_TEXT >> 20)));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn refused(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what.into())
}

/// `value`, if it isn't too large or too deep.
fn bounded(state: &State, value: Value) -> Result<Value, Error> {
    if value.as_object().is_some() {
        measure(state, &value)?;
    }
    Ok(value)
}

/// `value`, if in addition it is no namespace. So no namespace can be part of another or of itself.
fn plain(state: &State, value: Value) -> Result<Value, Error> {
    if is_namespace(&value) { Err(refused("a namespace in a namespace")) } else { bounded(state, value) }
}

fn is_namespace(value: &Value) -> bool {
    value.as_object().is_some_and(|object| object.type_name().ends_with("Namespace"))
}

fn tojson(state: &State, value: &Value, indent: Option<Value>, options: Kwargs) -> Result<Value, Error> {
    let asked = match &indent {
        Some(indent) => Some(indent.clone()),
        None => options.peek::<Option<Value>>("indent")?,
    };
    if asked.and_then(|indent| usize::try_from(indent).ok()).is_some_and(|spaces| spaces > MOST_INDENT) {
        return Err(refused(format!("tojson indents by at most {MOST_INDENT} spaces")));
    }
    let text = filters::tojson(&bounded(state, value.clone())?, indent, options)?;
    state.consume_fuel(text.as_str().map_or(0, str::len) as u64 / 8)?;
    Ok(text)
}

/// Python's methods of strings, lists and dictionaries. The widths in a format are not covered by fuel.
pub(super) fn python_method(
    state: &mut State,
    value: &Value,
    method: &str,
    arguments: &[Value],
) -> Result<Value, Error> {
    if let Some(format) = value.as_str().filter(|_| method == "format") {
        let longest = format.split(|c: char| !c.is_ascii_digit()).map(str::len).max();
        if longest > Some(MOST_DIGITS) {
            return Err(refused(format!("a format of more than {MOST_DIGITS} digits")));
        }
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, arguments)
}

/// Fails if a value is too large or too deep, and pays for looking at it.
fn measure(state: &State, value: &Value) -> Result<(), Error> {
    let mut size = Size { values: 0, bytes: 0 };
    size.add(value, 0)?;
    state.consume_fuel(size.values as u64 / 16)
}

struct Size {
    values: usize,
    bytes: usize,
}

impl Size {
    fn add(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        self.values += 1;
        self.bytes = self.bytes.saturating_add(value.as_str().map_or(0, str::len));
        if self.values > MOST_VALUES || self.bytes > MOST_BYTES {
            let (values, mib) = (MOST_VALUES, MOST_BYTES >> 20);
            return Err(refused(format!("a list or map of more than {values} values or {mib} MiB")));
        }
        if depth > MOST_DEPTH {
            return Err(refused(format!("a list or map that is nested more than {MOST_DEPTH} times")));
        }
        if is_namespace(value) {
            // What is in it was looked at before.
            return if depth == 0 { Ok(()) } else { Err(refused("a namespace in a list or map")) };
        }
        match value.kind() {
            ValueKind::Map => value.try_iter()?.checked().try_for_each(|key| {
                let key = key?;
                self.add(&key, depth + 1)?;
                self.add(&value.get_item(&key)?, depth + 1)
            }),
            ValueKind::Seq => value.try_iter()?.checked().try_for_each(|item| self.add(&item?, depth + 1)),
            // Without a length it may be one that can be gone through only once, and is not written out.
            ValueKind::Iterable if value.len().is_some() => {
                value.try_iter()?.checked().try_for_each(|item| self.add(&item?, depth + 1))
            }
            _ => Ok(()),
        }
    }
}
