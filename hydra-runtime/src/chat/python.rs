//! Python's methods of strings, lists and dictionaries, as templates that were written for jinja2 call them. What is not here
//! minijinja's own list has (`minijinja_contrib::pycompat`). Each is paid for as `chat/cost.rs` says.

use super::cost::{few, few_parts, is_space, pay_for_format, pay_for_looks, pay_for_trim, refused};
use minijinja::value::{Kwargs, Tuple, Value, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State};

/// The method of a value.
pub(super) fn method(state: &mut State, value: &Value, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    if value.kind() == ValueKind::Seq {
        pay_for_looks(state, value)?;
    }
    // These look at no more of the text than what they look for is long.
    let brief = matches!(method, "startswith" | "endswith" | "removeprefix" | "removesuffix");
    if let Some(text) = value.as_str().filter(|_| !brief) {
        state.consume_fuel(text.len() as u64 / 64)?;
    }
    for argument in arguments {
        let looks = argument.as_str().map_or(0, str::len) as u64;
        state.consume_fuel(looks / 64)?;
        if argument.kind() != ValueKind::Map && matches!(method, "startswith" | "endswith" | "join" | "count" | "index")
        {
            pay_for_looks(state, argument)?;
        }
    }
    let own = match value.kind() {
        ValueKind::String => of_text(state, value.as_str().unwrap_or_default(), method, arguments)?,
        ValueKind::Seq => of_list(value, method, arguments)?,
        ValueKind::Map if method == "copy" => Some(value.clone()),
        _ => None,
    };
    match own {
        Some(result) => Ok(result),
        None => minijinja_contrib::pycompat::unknown_method_callback(state, value, method, arguments),
    }
}

/// The methods of a list that minijinja doesn't have.
fn of_list(list: &Value, method: &str, arguments: &[Value]) -> Result<Option<Value>, Error> {
    match method {
        "copy" => Ok(Some(list.clone())),
        "index" => {
            let (what,): (&Value,) = from_args(arguments)?;
            for (place, item) in list.try_iter()?.checked().enumerate() {
                if item? == *what {
                    return Ok(Some(Value::from(place)));
                }
            }
            Err(refused("index: the list has no such value"))
        }
        _ => Ok(None),
    }
}

/// The methods of a string in which minijinja and Python differ.
fn of_text(state: &State, text: &str, method: &str, arguments: &[Value]) -> Result<Option<Value>, Error> {
    let result = match method {
        "strip" | "lstrip" | "rstrip" => {
            let (of,): (Option<&str>,) = from_args(arguments)?;
            pay_for_trim(state, text, of)?;
            let out = |c: char| of.map_or(is_space(c), |of| of.contains(c));
            let text = if method == "rstrip" { text } else { text.trim_start_matches(out) };
            Value::from(if method == "lstrip" { text } else { text.trim_end_matches(out) })
        }
        "split" | "rsplit" => {
            let (by, most, named): (Option<&str>, Option<i64>, Kwargs) = from_args(arguments)?;
            let by = by.map_or_else(|| named.get::<Option<&str>>("sep"), |by| Ok(Some(by)))?;
            let most = most.map_or_else(|| named.get::<Option<i64>>("maxsplit"), |most| Ok(Some(most)))?;
            named.assert_all_used()?;
            let most = most.filter(|&most| most >= 0);
            few_parts(text, by, most)?;
            let most = most.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX);
            match by {
                Some("") => return Err(refused(format!("{method}: an empty separator"))),
                Some(by) if method == "split" => text.splitn(most.saturating_add(1), by).map(Value::from).collect(),
                Some(by) => {
                    let parts: Vec<_> = text.rsplitn(most.saturating_add(1), by).map(Value::from).collect();
                    parts.into_iter().rev().collect()
                }
                None if method == "split" => words(text, most).into(),
                None => words_from_the_end(text, most).into(),
            }
        }
        "partition" | "rpartition" => {
            let (by,): (&str,) = from_args(arguments)?;
            if by.is_empty() {
                return Err(refused(format!("{method}: an empty separator")));
            }
            let found = if method == "partition" { text.split_once(by) } else { text.rsplit_once(by) };
            let parts = match found {
                Some((before, after)) => [before, by, after],
                None if method == "partition" => [text, "", ""],
                None => ["", "", text],
            };
            Tuple::from(parts.map(Value::from)).into()
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(arguments)?;
            text.strip_prefix(prefix).unwrap_or(text).into()
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(arguments)?;
            text.strip_suffix(suffix).unwrap_or(text).into()
        }
        "splitlines" => {
            let (keep, named): (Option<bool>, Kwargs) = from_args(arguments)?;
            let keep = keep.map_or_else(|| named.get::<Option<bool>>("keepends"), |keep| Ok(Some(keep)))?;
            named.assert_all_used()?;
            few(lines(text))?;
            let line = |(line, end): (&str, &str)| match keep {
                Some(true) => Value::from([line, end].concat()),
                _ => Value::from(line),
            };
            lines(text).map(line).collect::<Vec<_>>().into()
        }
        "replace" => {
            let (old, new, most, named): (&str, &str, Option<i64>, Kwargs) = from_args(arguments)?;
            let most = most.map_or_else(|| named.get::<Option<i64>>("count"), |most| Ok(Some(most)))?;
            named.assert_all_used()?;
            let most = most.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX);
            // Paid for before it is made.
            let times = (text.len() / old.len().max(1)).saturating_add(1).min(most);
            state.consume_fuel(times.saturating_mul(new.len().saturating_sub(old.len())) as u64 / 64)?;
            text.replacen(old, new, most).into()
        }
        "find" | "rfind" | "index" | "rindex" => {
            let (what, first, end): (&str, Option<i64>, Option<i64>) = from_args(arguments)?;
            let found = part(text, first, end).and_then(|(before, part)| {
                let found = if method.starts_with('r') { part.rfind(what) } else { part.find(what) };
                Some(before + part[..found?].chars().count())
            });
            match found {
                Some(place) => place.into(),
                None if method.ends_with("find") => (-1).into(),
                None => return Err(refused(format!("{method}: the text has no such part"))),
            }
        }
        "count" => {
            let (what, first, end): (&str, Option<i64>, Option<i64>) = from_args(arguments)?;
            part(text, first, end).map_or(0, |(_, part)| part.matches(what).count()).into()
        }
        "startswith" | "endswith" if arguments.len() > 1 => {
            let (what, first, end): (Value, Option<i64>, Option<i64>) = from_args(arguments)?;
            state.consume_fuel(text.len() as u64 / 64)?;
            match part(text, first, end) {
                Some((_, part)) => return method_of_part(state, part, method, &[what]).map(Some),
                None => false.into(),
            }
        }
        "capitalize" => capitalized(text).into(),
        "title" => title(text).into(),
        "swapcase" => {
            let mut swapped = String::new();
            text.chars().for_each(|c| cased(&mut swapped, c, !c.is_uppercase()));
            swapped.into()
        }
        "casefold" => text.to_lowercase().replace('ß', "ss").into(),
        "isdigit" | "isdecimal" => {
            let digit = |c: char| if c.is_ascii() { c.is_ascii_digit() } else { c.is_numeric() };
            (!text.is_empty() && text.chars().all(digit)).into()
        }
        "isspace" => (!text.is_empty() && text.chars().all(is_space)).into(),
        "ljust" | "rjust" | "center" => {
            let (width, fill): (i64, Option<char>) = from_args(arguments)?;
            let missing = missing(state, text, width)?;
            let fill = |count: usize| fill.unwrap_or(' ').to_string().repeat(count);
            // Python puts the odd one to the left if the width is odd.
            let left = match method {
                "ljust" => 0,
                "rjust" => missing,
                _ => missing / 2 + (missing & width as usize & 1),
            };
            [fill(left).as_str(), text, &fill(missing - left)].concat().into()
        }
        "zfill" => {
            let (width,): (i64,) = from_args(arguments)?;
            let zeros = "0".repeat(missing(state, text, width)?);
            let signs = text.len() - text.strip_prefix(['+', '-']).unwrap_or(text).len();
            let (sign, digits) = text.split_at(signs);
            [sign, &zeros, digits].concat().into()
        }
        "format" => {
            pay_for_format(state, text, '{', arguments)?;
            return Ok(None);
        }
        _ => return Ok(None),
    };
    Ok(Some(result))
}

/// `startswith` and `endswith` of a part of a text.
fn method_of_part(state: &State, part: &str, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    let ends = |what: &Value| match what.as_str() {
        Some(what) if method == "startswith" => Ok(part.starts_with(what)),
        Some(what) => Ok(part.ends_with(what)),
        None => Err(Error::new(ErrorKind::InvalidOperation, format!("{method} takes a text or several"))),
    };
    let mut found = false;
    for what in arguments {
        pay_for_looks(state, what)?;
        match what.kind() {
            ValueKind::Seq | ValueKind::Iterable => {
                for what in what.try_iter()?.checked() {
                    found |= ends(&what?)?;
                }
            }
            _ => found |= ends(what)?,
        }
    }
    Ok(found.into())
}

/// jinja2's filter: all lines but the first are indented, or all; empty ones stay so unless `blank` says otherwise.
pub(super) fn indent(state: &State, text: &str, arguments: &[Value]) -> Result<String, Error> {
    let (width, first, blank, named): (Option<Value>, Option<bool>, Option<bool>, Kwargs) = from_args(arguments)?;
    let width = width.map_or_else(|| named.get::<Option<Value>>("width"), |width| Ok(Some(width)))?;
    let first = first.map_or_else(|| named.get::<Option<bool>>("first"), |first| Ok(Some(first)))?.unwrap_or(false);
    let blank = blank.map_or_else(|| named.get::<Option<bool>>("blank"), |blank| Ok(Some(blank)))?.unwrap_or(false);
    named.assert_all_used()?;
    let count = lines(text).count();
    let pay = |width: usize| state.consume_fuel(count.saturating_mul(width).saturating_add(text.len()) as u64 / 64);
    let indention = match width {
        Some(width) if width.as_str().is_some() => {
            pay(width.as_str().map_or(0, str::len))?;
            width.to_string()
        }
        width => {
            let width = width.map_or(Ok(4), usize::try_from)?;
            pay(width)?;
            " ".repeat(width)
        }
    };
    let mut indented = String::new();
    // What ends the last line begins an empty one.
    let ends = text.is_empty() || text.ends_with(is_line_end);
    for (i, line) in lines(text).map(|(line, _)| line).chain(ends.then_some("")).enumerate() {
        indented += if i > 0 { "\n" } else { "" };
        indented += if (i == 0 && first) || (i > 0 && (blank || !line.is_empty())) { &indention } else { "" };
        indented += line;
    }
    Ok(indented)
}

/// Whether `str.splitlines` ends a line there.
fn is_line_end(c: char) -> bool {
    matches!(c, '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}')
}

/// The lines of a text, each with what ends it.
fn lines(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let at = rest.find(is_line_end).unwrap_or(rest.len());
        let (line, end) = rest.split_at(at);
        let end = match end.chars().next() {
            Some('\r') if end.starts_with("\r\n") => &end[..2],
            first => &end[..first.map_or(0, char::len_utf8)],
        };
        rest = &rest[line.len() + end.len()..];
        Some((line, end))
    })
}

/// The words of a text, of which the last is the rest after `most` cuts.
fn words(text: &str, most: usize) -> Vec<Value> {
    let (mut words, mut rest) = (Vec::new(), text.trim_start_matches(is_space));
    while !rest.is_empty() {
        let end = if words.len() < most { rest.find(is_space).unwrap_or(rest.len()) } else { rest.len() };
        words.push(Value::from(&rest[..end]));
        rest = rest[end..].trim_start_matches(is_space);
    }
    words
}

/// The same, where the first is the rest.
fn words_from_the_end(text: &str, most: usize) -> Vec<Value> {
    let (mut words, mut rest) = (Vec::new(), text.trim_end_matches(is_space));
    while !rest.is_empty() {
        let space = rest.char_indices().rfind(|&(_, c)| is_space(c)).filter(|_| words.len() < most);
        let start = space.map_or(0, |(at, c)| at + c.len_utf8());
        words.push(Value::from(&rest[start..]));
        rest = rest[..start].trim_end_matches(is_space);
    }
    words.reverse();
    words
}

/// `text[first:end]`, with the number of characters before it; `None` if it begins behind the text's end.
fn part(text: &str, first: Option<i64>, end: Option<i64>) -> Option<(usize, &str)> {
    if first.is_none() && end.is_none() {
        return Some((0, text));
    }
    let length = text.chars().count();
    let place = |at: i64| if at < 0 { length.saturating_sub(at.unsigned_abs() as usize) } else { at as usize };
    let (first, end) = (first.map_or(0, place), end.map_or(length, place).min(length));
    let at = |place: usize| text.char_indices().nth(place).map_or(text.len(), |(at, _)| at);
    (first <= end).then(|| (first, &text[at(first)..at(end)]))
}

/// The characters that `text` lacks to be `width` long, paid for.
fn missing(state: &State, text: &str, width: i64) -> Result<usize, Error> {
    let missing = usize::try_from(width).unwrap_or(0).saturating_sub(text.chars().count());
    state.consume_fuel(missing as u64 / 16)?;
    Ok(missing)
}

/// Adds a character in upper or lower case.
fn cased(text: &mut String, c: char, upper: bool) {
    if upper { text.extend(c.to_uppercase()) } else { text.extend(c.to_lowercase()) }
}

fn capitalized(text: &str) -> String {
    let (mut capitalized, mut chars) = (String::new(), text.chars());
    chars.next().into_iter().for_each(|first| cased(&mut capitalized, first, true));
    capitalized + &chars.as_str().to_lowercase()
}

/// The first letter of each row of letters in upper case, the others in lower case.
fn title(text: &str) -> String {
    let (mut titled, mut within) = (String::new(), false);
    for c in text.chars() {
        cased(&mut titled, c, !within);
        within = c.is_alphabetic();
    }
    titled
}

#[cfg(test)]
mod tests {
    use crate::chat::{ChatTemplate, Message};

    /// As `apply_chat_template` of transformers 5.24 writes them.
    #[rustfmt::skip]
    const EXPRESSIONS: [(&str, &str); 104] = [
        ("' a b  c '.rsplit(None, 1)", "[' a b', 'c']"),
        ("' a b  c '.split(None, 1)", "['a', 'b  c ']"),
        ("' a b  c '.split()", "['a', 'b', 'c']"),
        ("' a b  c '.rsplit()", "['a', 'b', 'c']"),
        ("'a,b,c'.rsplit(',', 1)", "['a,b', 'c']"),
        ("'a,b,c'.rsplit(',')", "['a', 'b', 'c']"),
        ("'a,b,c'.rsplit(',', maxsplit=1)", "['a,b', 'c']"),
        ("'a,b,c'.split(',', maxsplit=1)", "['a', 'b,c']"),
        ("'a,b,c'.split(sep=',')", "['a', 'b', 'c']"),
        ("'a,b,c'.split(',', 0)", "['a,b,c']"),
        ("'a,b,c'.split(',', -1)", "['a', 'b', 'c']"),
        ("' a b '.split(maxsplit=0)", "['a b ']"),
        ("' a b '.rsplit(maxsplit=0)", "[' a b']"),
        ("''.split(',')", "['']"),
        ("''.split()", "[]"),
        ("'a'.partition('-')", "('a', '', '')"),
        ("'a-b-c'.partition('-')", "('a', '-', 'b-c')"),
        ("'a-b-c'.rpartition('-')", "('a-b', '-', 'c')"),
        ("'abc'.rpartition('-')", "('', '', 'abc')"),
        ("'a-b'.partition('-')[2]", "b"),
        ("'prefix-x'.removeprefix('prefix-')", "x"),
        ("'x.py'.removesuffix('.py')", "x"),
        ("'x.py'.removesuffix('')", "x.py"),
        ("'xxaxx'.strip('x')", "a"),
        ("'xxaxx'.lstrip('x')", "axx"),
        ("'xxaxx'.rstrip('x')", "xxa"),
        ("'\\n\\t a \\n'.strip()", "a"),
        ("'\\n\\t a \\n'.strip(' \\n')", "\t a"),
        ("'xaxx'.strip('')", "xaxx"),
        ("'hello wORLD'.capitalize()", "Hello world"),
        ("'ünï'.capitalize()", "Ünï"),
        ("\"hello wORLD's x1y\".title()", "Hello World'S X1Y"),
        ("'Hello'.swapcase()", "hELLO"),
        ("'Straße'.casefold()", "strasse"),
        ("'12'.isdigit()", "True"),
        ("'1.2'.isdigit()", "False"),
        ("''.isdigit()", "False"),
        ("'½'.isnumeric()", "True"),
        ("'12'.isdecimal()", "True"),
        ("'12'.isnumeric()", "True"),
        ("'ab1'.isalpha()", "False"),
        ("'ab'.isalpha()", "True"),
        ("' '.isspace()", "True"),
        ("''.isspace()", "False"),
        ("'abcabc'.find('c')", "2"),
        ("'abcabc'.find('c', 3)", "5"),
        ("'abcabc'.find('z')", "-1"),
        ("'abcabc'.rfind('c')", "5"),
        ("'abcabc'.rfind('c', 0, 4)", "2"),
        ("'abcabc'.index('b')", "1"),
        ("'abcabc'.rindex('b')", "4"),
        ("'äbc'.find('c')", "2"),
        ("'aaa'.count('a')", "3"),
        ("'aaa'.count('a', 1)", "2"),
        ("'aaa'.count('')", "4"),
        ("'abc'.find('', 5)", "-1"),
        ("'abc'.find('', 3)", "3"),
        ("'abc'.startswith('b', 1)", "True"),
        ("'abc'.startswith(('x', 'a'))", "True"),
        ("'abc'.endswith(('x', 'c'))", "True"),
        ("'abc'.endswith('b', 0, 2)", "True"),
        ("'abc'.endswith('b', 0, -1)", "True"),
        ("'a-b-c'.replace('-', '+', 1)", "a+b-c"),
        ("'a-b-c'.replace('-', '+')", "a+b+c"),
        ("'abc'.replace('', '-')", "-a-b-c-"),
        ("'abc'.replace('', '-', 2)", "-a-bc"),
        ("'abc'.replace('b', '')", "ac"),
        ("'a\\nb\\r\\nc\\rd'.splitlines()", "['a', 'b', 'c', 'd']"),
        ("'a\\nb\\n'.splitlines(true)", "['a\\n', 'b\\n']"),
        ("'a\\nb\\n'.splitlines(keepends=true)", "['a\\n', 'b\\n']"),
        ("'a\\n\\nb'.splitlines()", "['a', '', 'b']"),
        ("''.splitlines()", "[]"),
        ("'ab'.center(7, '*')", "***ab**"),
        ("'abc'.center(6, '*')", "*abc**"),
        ("'abc'.ljust(5) ~ '|'", "abc  |"),
        ("'abc'.rjust(5, '.')", "..abc"),
        ("'42'.zfill(5)", "00042"),
        ("'-42'.zfill(5)", "-0042"),
        ("'a'.zfill(0)", "a"),
        ("'x'|int", "0"),
        ("'x'|int(5)", "5"),
        ("'a\\nb'|indent", "a\n    b"),
        ("'a\\nb\\n'|indent", "a\n    b\n"),
        ("'a\\nb\\n\\nc'|indent(2)", "a\n  b\n\n  c"),
        ("'a\\nb\\n\\nc'|indent(2, true)", "  a\n  b\n\n  c"),
        ("'a\\nb\\n\\nc\\n'|indent(2, true, true)", "  a\n  b\n  \n  c\n  "),
        ("'a\\nb'|indent('> ')", "a\n> b"),
        ("'a\\nb'|indent(width=2, first=true)", "  a\n  b"),
        ("'a\\nb\\n'|indent(width=2, blank=true)", "a\n  b\n  "),
        ("''|indent", ""),
        ("'\\n'|indent", "\n"),
        ("'a\\r\\nb'|indent(2)", "a\n  b"),
        ("'a\\nb'|indent(0)", "a\nb"),
        ("[] is sequence", "True"),
        ("'a' is sequence", "True"),
        ("{} is sequence", "True"),
        ("{'a': 1}.copy()", "{'a': 1}"),
        ("[1, 2].copy()", "[1, 2]"),
        ("[1, 2].index(2)", "1"),
        ("[1, 2, 1].count(1)", "2"),
        ("'abc'.upper().lower().title()", "Abc"),
        ("'a,b'.split(',')|map('upper')|join(';')", "A;B"),
        ("'a-b-c'.split('-', 1)|list", "['a', 'b-c']"),
        ("'Jan 01'.split(' ')[1]|int + 1", "2"),
    ];

    #[test]
    fn methods_are_pythons() {
        for (expression, wanted) in EXPRESSIONS {
            let template = format!("{{{{ {expression} }}}}");
            let chat = ChatTemplate::with_tokens(&template, String::new(), String::new()).unwrap();
            let text = chat.prompt(&[Message::user("Hi")]);
            assert_eq!(text.map_err(|error| error.to_string()).as_deref(), Ok(wanted), "{expression}");
        }
    }

    #[test]
    fn what_python_refuses() {
        for expression in ["'a'.split('')", "'a'.partition('')", "'a'.index('b')", "[1].index(2)", "[1].append(2)"] {
            let chat =
                ChatTemplate::with_tokens(&format!("{{{{ {expression} }}}}"), String::new(), String::new()).unwrap();
            assert!(chat.prompt(&[Message::user("Hi")]).is_err(), "{expression}");
        }
    }
}
