//! How long a pattern of a step is once its counted repetitions are written out.

use super::lookaround;
use crate::error::printable;
use serde_json::Value;

/// The most characters of a pattern with its counted repetitions written out; Jais 2's has 1,200. It bounds the time for a
/// place in a text, but for what a pattern with look-around tries again.
const MOST_PATTERN: f64 = 4096.0;

/// An error if a step's pattern, an expression or a text, is too long or may take too long. `name` is the part of the pipeline.
pub(super) fn check(name: &str, pattern: &Value) -> Result<(), String> {
    let length = [pattern["Regex"].as_str().map(written_out), pattern["String"].as_str().map(|text| text.len() as f64)];
    match length.into_iter().flatten().find(|&length| length > MOST_PATTERN) {
        Some(length) => {
            let found = format!("a pattern of {length:.0} characters with its repetitions written out");
            Err(format!("{name} has {found}: expected at most {MOST_PATTERN}"))
        }
        None => {
            let expression = pattern["Regex"].as_str().unwrap_or_default();
            let slow =
                |why| format!("{name} has a pattern that may take too long, \"{}\": {why}", printable(expression));
            lookaround::check(expression).map_err(slow)
        }
    }
}

/// The length of a regular expression in which `a{2,5}` is `aaaaa`, at least: a repetition without an end counts as its beginning.
/// What isn't an expression has some length, too.
fn written_out(pattern: &str) -> f64 {
    // Too long as it is, and the rest takes the square of the length where brackets aren't closed.
    if pattern.len() as f64 > 4.0 * MOST_PATTERN {
        return pattern.chars().count() as f64;
    }
    // The lengths of the groups that are open, and that of what stands before a repetition.
    let (mut groups, mut length, mut last) = (Vec::new(), 0.0, 0.0);
    let (mut rest, commented) = (pattern, pattern.contains('#'));
    while let Some(c) = rest.chars().next() {
        let width = match c {
            '\\' => escape(rest),
            '[' => class(rest),
            '{' => rest.find('}').map_or(1, |end| end + 1),
            _ => c.len_utf8(),
        };
        let (token, behind) = rest.split_at(width);
        rest = behind;
        match (c, counted(token)) {
            ('(', _) => {
                groups.push(length);
                (length, last) = (0.0, 0.0);
            }
            (')', _) => {
                last = length + 1.0;
                length = groups.pop().unwrap_or(0.0) + last;
            }
            ('{', Some(most)) => {
                length += last * (most - 1.0).max(0.0);
                last *= most.max(1.0);
            }
            ('*' | '+' | '?', _) => length += 1.0,
            _ => {
                let own = token.chars().count() as f64;
                // A space or a comment may stand between a group and its repetition.
                last = if commented || c.is_whitespace() { own.max(last) } else { own };
                length += own;
            }
        }
    }
    groups.into_iter().sum::<f64>() + length
}

/// How often `{2}`, `{2,}` or `{2,5}` repeats, at least or at most.
fn counted(token: &str) -> Option<f64> {
    let inner = token.strip_prefix('{')?.strip_suffix('}')?;
    let numbers = inner.split(',').map(str::trim).filter(|number| !number.is_empty());
    numbers
        .map(|number| number.parse::<u32>().ok().map(f64::from))
        .try_fold(0.0, |most, number| Some(number?.max(most)))
}

/// The bytes of an escape at the beginning of a pattern: `\n`, `\p{Han}`.
fn escape(pattern: &str) -> usize {
    let mut characters = pattern.char_indices().skip(1);
    let escaped = characters.next().map(|(_, c)| c);
    let next = characters.next();
    let named = matches!(escaped, Some('p' | 'P' | 'x' | 'u' | 'U')) && next.is_some_and(|(_, c)| c == '{');
    let end = named.then(|| pattern.find('}')).flatten().map(|end| end + 1);
    end.unwrap_or(next.map_or(pattern.len(), |(at, _)| at))
}

/// The bytes of a class at the beginning of a pattern: `[^\s[a-c]]`.
fn class(pattern: &str) -> usize {
    let (mut depth, mut at) = (0usize, 0);
    while let Some(c) = pattern[at..].chars().next() {
        at += if c == '\\' { escape(&pattern[at..]) } else { c.len_utf8() };
        match c {
            '[' => {
                depth += 1;
                // A bracket in first place is a character.
                let first = pattern[at..].strip_prefix('^').unwrap_or(&pattern[at..]);
                if first.starts_with(']') {
                    at += pattern[at..].len() - first.len() + 1;
                }
            }
            ']' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return at;
        }
    }
    // It is not one, and a pattern with it is refused.
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_written_out() {
        let cases = [
            ("a{2,5}", 5.0),
            ("(a{10}b){20,}", 240.0),
            (r"\p{Han}{3}", 21.0),
            ("[{9}]{2}", 10.0),
            (r"[^]\]{9}]", 9.0),
            (r"a\{9}", 5.0),
            ("(?:(?:((?=a)){1000}){1000}){1000}", 5_003_003_000.0),
            (r" ?[^\s\p{L}]+|\s+(?!\S)", 22.0),
            ("a{", 2.0),
            ("(ab) {9}", 28.0),
            ("(ab)#c\n{9}", 30.0),
            ("é{4294967295}", 4_294_967_295.0),
            ("[", 1.0),
            ("\\", 1.0),
            ("))", 2.0),
        ];
        for (pattern, wanted) in cases {
            assert_eq!(written_out(pattern), wanted, "{pattern}");
        }
    }
}
