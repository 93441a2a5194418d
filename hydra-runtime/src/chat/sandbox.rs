//! Limits for templates, which come with a stranger's model: on the work of a rendering, its text, its values and their nesting.
//!
//! minijinja's fuel bounds instructions and the data that they make. What it can't see are containers that it makes lazily
//! (`[1] * 1000000000`) or recursively (a namespace in itself) and writes out afterwards. `chat/checks.rs` therefore puts one
//! of the two filters of this file around every expression that can make such a value. What values cost is in `chat/cost.rs`.

use super::checks::{self, BOUNDED, PAID, PLAIN, REMAINDER, TEXT};
use super::cost::{
    MOST_TEXT, Size, few_parts, is_namespace, measure, pay_for_either, pay_for_format, pay_for_looks, pay_for_order,
    pay_for_trim, refused,
};
use super::json::Style;
use super::remainder::remainder;
use super::{objects, python};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, StringInput, Value, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, State, filters, functions, tests};
use std::borrow::Cow;
use std::io;
use std::sync::Arc;

/// Instructions, and for each one 64 bytes of data: a conversation of a thousand turns needs some ten thousand.
const FUEL: u64 = 4_000_000;
/// A macro takes 10 of these.
const RECURSION: usize = 300;
/// Values that `chain` joins to one.
const MOST_CHAINED: usize = 64;

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
    environment.add_filter(PAID, |state: &State, value: Value| pay_for_looks(state, &value).map(|_| value));
    // Fuel is taken for a text that a filter gets.
    environment.add_filter(TEXT, |value: Value| value);
    environment.add_filter(REMAINDER, |state: &mut State, left: &Value, right: &Value| remainder(state, left, right));
    add_comparisons(&mut environment);
    environment.add_filter("string", |state: &State, value: Value| filters::string(state, &bounded(state, value)?));
    environment.add_filter("pprint", |state: &State, value: Value| Ok(filters::pprint(&bounded(state, value)?)));
    environment.add_filter("tojson", tojson);
    environment.add_filter("batch", |state: &State, value: Value, count: usize, fill: Option<Value>| {
        bounded(state, filters::batch(state, value, count, fill)?)
    });
    environment.add_filter("slice", |state: &State, value: Value, count: usize, fill: Option<Value>| {
        bounded(state, filters::slice(state, value, count, fill)?)
    });
    environment.add_filter("map", map);
    environment.add_filter("trim", |state: &State, value: StringInput<'_>, of: Option<Cow<'_, str>>| {
        pay_for_trim(state, value.as_str(), of.as_deref())?;
        Ok(filters::trim(value, of))
    });
    // What is no number is 0 in jinja2, unless the template says otherwise.
    environment.add_filter(
        "int",
        |state: &State, value: &Value, default: Option<Value>, base: Option<u32>, more: Kwargs| {
            filters::int(state, value, default, base, more).unwrap_or_else(|_| 0.into())
        },
    );
    environment.add_filter("float", |state: &State, value: &Value, default: Option<Value>, more: Kwargs| {
        let other =
            default.clone().map_or_else(|| more.peek::<Option<Value>>("default"), |default| Ok(Some(default)))?;
        Ok::<_, Error>(filters::float(state, value, default, more).unwrap_or_else(|_| other.unwrap_or(0.0.into())))
    });
    // One may go through nothing that isn't defined, but not through none.
    environment.add_test("iterable", |value: &Value| !value.is_none() && tests::is_iterable(value));
    // In Python texts and dictionaries are sequences, too.
    environment.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Map)
    });
    environment.add_filter("indent", |state: &State, text: Cow<'_, str>, arguments: Rest<ValueOrKwargs>| {
        let arguments: Vec<_> = arguments.iter().map(|argument| argument.clone().into_value()).collect();
        python::indent(state, &text, &arguments)
    });
    environment.add_filter("split", |state: &State, value: &Value, by: Option<Arc<str>>, most: Option<i64>| {
        few_parts(value.as_str().unwrap_or(""), by.as_deref(), most)?;
        bounded(state, filters::split(value, by, most)?)
    });
    environment.add_filter("lines", |state: &State, value: &Value| {
        few_parts(value.as_str().unwrap_or(""), Some("\n"), None)?;
        bounded(state, filters::lines(value)?)
    });
    environment.add_filter("reverse", |state: &State, value: Value| bounded(state, filters::reverse(&value)?));
    environment.add_filter("chain", chain);
    environment.add_filter("zip", |state: &State, value: Value, others: Rest<Value>| {
        bounded(state, filters::zip(state, value, others)?)
    });
    environment.add_filter("sum", sum);
    environment.add_filter("format", |state: &mut State, format: &Value, arguments: Rest<ValueOrKwargs>| {
        let values: Vec<_> = arguments.iter().map(|argument| argument.clone().into_value()).collect();
        pay_for_format(state, format.as_str().unwrap_or(""), '%', &values)?;
        filters::format(state, format, arguments)
    });
    environment.add_function("dict", dict);
    environment.add_function("namespace", |state: &State, value: Option<Value>, more: Kwargs| {
        let values = plain(state, dict(state, value, more)?, None)?;
        functions::namespace(Some(values.into()))
    });
    environment.add_function("cycler", objects::cycler);
    environment.add_function("joiner", objects::joiner);
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

/// `value`, if it isn't too large or too deep; as a list if it only says how to go through other values.
fn bounded(state: &State, value: Value) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::Iterable => gathered(state, &value),
        _ if value.as_object().is_some() => measure(state, &value).map(|()| value),
        _ => Ok(value),
    }
}

/// A list of what is in `value`. Values that go through others as they are read would be as deep as there are of them, and
/// each could take twice as long as the one before.
fn gathered(state: &State, value: &Value) -> Result<Value, Error> {
    let (mut size, mut items) = (Size::default(), Vec::new());
    for item in value.try_iter()?.checked() {
        let item = item?;
        size.add(&item, 1)?;
        items.push(item);
    }
    size.pay(state)?;
    Ok(Value::from(items))
}

/// One map of several, or one list of several.
fn chain(state: &State, value: Value, others: Rest<Value>) -> Result<Value, Error> {
    if others.len() > MOST_CHAINED {
        return Err(refused(format!("chain joins at most {MOST_CHAINED} values to one")));
    }
    let chained = filters::chain(state, value, others)?;
    if chained.kind() == ValueKind::Map {
        return bounded(state, functions::dict(Some(chained), Kwargs::from_iter([("", Value::UNDEFINED); 0]))?);
    }
    gathered(state, &chained)
}

/// What a filter makes of each value. Were it `map` in turn, each of its arguments could be a call within a call.
fn map(state: &mut State, value: Value, arguments: Rest<ValueOrKwargs>) -> Result<Vec<Value>, Error> {
    let named = arguments.first().map(|argument| argument.clone().into_value());
    if named.is_some_and(|filter| filter.as_str() == Some("map")) {
        return Err(refused("map of map"));
    }
    filters::map(state, value, arguments)
}

/// Tests and filters that compare texts, which take no fuel for that by themselves.
fn add_comparisons(environment: &mut Environment<'_>) {
    type Compared = fn(&Value, &Value) -> bool;
    let compared: [(&[&'static str], Compared); 7] = [
        (&["eq", "equalto", "=="], tests::is_eq),
        (&["ne", "!="], tests::is_ne),
        (&["lt", "lessthan", "<"], tests::is_lt),
        (&["le", "<="], tests::is_le),
        (&["gt", "greaterthan", ">"], tests::is_gt),
        (&["ge", ">="], tests::is_ge),
        (&["sameas"], tests::is_sameas),
    ];
    for (names, compare) in compared {
        for &name in names {
            environment.add_test(name, move |state: &State, value: &Value, other: &Value| {
                pay_for_either(state, value, other)?;
                Ok(compare(value, other))
            });
        }
    }
    environment.add_test("in", |state: &State, value: &Value, other: &Value| {
        pay_for_looks(state, other)?;
        tests::is_in(state, value, other)
    });
    environment.add_test("startingwith", |state: &State, value: Cow<'_, str>, other: Cow<'_, str>| {
        state.consume_fuel(other.len() as u64 / 64)?;
        Ok(tests::is_startingwith(value, other))
    });
    environment.add_test("endingwith", |state: &State, value: Cow<'_, str>, other: Cow<'_, str>| {
        state.consume_fuel(other.len() as u64 / 64)?;
        Ok(tests::is_endingwith(value, other))
    });
    for (name, cased) in [("lower", tests::is_lower as fn(&Value) -> bool), ("upper", tests::is_upper)] {
        environment.add_test(name, move |state: &State, value: &Value| {
            pay_for_looks(state, value)?;
            Ok(cased(value))
        });
    }
    type Sorted = fn(&State, Value, Kwargs) -> Result<Value, Error>;
    let sorted: [(&'static str, Sorted); 4] =
        [("sort", filters::sort), ("unique", filters::unique), ("min", filters::min), ("max", filters::max)];
    for (name, sort) in sorted {
        environment.add_filter(name, move |state: &State, values: Value, more: Kwargs| {
            pay_for_order(state, &values)?;
            sort(state, values, more)
        });
    }
    environment.add_filter("dictsort", |state: &State, value: &Value, more: Kwargs| {
        pay_for_order(state, value)?;
        filters::dictsort(value, more)
    });
    environment.add_filter("groupby", |state: &State, value: Value, attribute: Option<&str>, more: Kwargs| {
        pay_for_order(state, &value)?;
        filters::groupby(value, attribute, more)
    });
}

/// A map of a map, or of a list of pairs, and of what has a name.
fn dict(state: &State, value: Option<Value>, more: Kwargs) -> Result<Value, Error> {
    let value = match value {
        Some(list) if matches!(list.kind(), ValueKind::Seq | ValueKind::Iterable) => {
            let list = bounded(state, list)?;
            let pair = |pair: Result<Value, Error>| match pair?.try_iter()?.checked().collect::<Result<Vec<_>, _>>()?[..]
            {
                [ref key, ref value] => Ok((key.clone(), value.clone())),
                _ => Err(refused("dict: expected a map or a list of pairs")),
            };
            Some(Value::from_pairs(list.try_iter()?.checked().map(pair).collect::<Result<Vec<_>, Error>>()?))
        }
        other => other,
    };
    bounded(state, functions::dict(value, more)?)
}

/// The sum of numbers: texts and lists would be copied for each addition.
fn sum(
    state: &State,
    values: Value,
    attribute: Option<&str>,
    start: Option<Value>,
    more: Kwargs,
) -> Result<Value, Error> {
    let named = more.peek::<Option<Value>>("start")?;
    if [&start, &named].into_iter().flatten().any(|start| !start.is_number()) {
        return Err(refused("sum adds numbers only"));
    }
    filters::sum(state, values, attribute, start, more)
}

/// `value`, if in addition it is no namespace and all that is in `namespace` is not too large with it. So no namespace can be
/// part of another or of itself.
fn plain(state: &State, value: Value, namespace: Option<Value>) -> Result<Value, Error> {
    if is_namespace(&value) {
        return Err(refused("a namespace in a namespace"));
    }
    let value = bounded(state, value)?;
    let mut size = Size::default();
    size.add(&value, 1)?;
    size.add(&namespace.unwrap_or_default(), 0)?;
    size.pay(state)?;
    Ok(value)
}

fn tojson(
    state: &State,
    value: Value,
    ensure_ascii: Option<bool>,
    indent: Option<usize>,
    options: Kwargs,
) -> Result<String, Error> {
    let text = Style::new(ensure_ascii, indent, &options)?.write(&bounded(state, value)?)?;
    state.consume_fuel(text.len() as u64 / 8)?;
    Ok(text)
}
