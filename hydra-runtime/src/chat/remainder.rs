//! Python's operator `%`: the remainder of numbers, and `'%s' % value`, which minijinja doesn't have.

use super::cost::{pay_for_format, refused};
use minijinja::value::{Rest, Tuple, Value, ValueKind, ValueOrKwargs};
use minijinja::{Error, State, filters};

/// `left % right`.
pub(super) fn remainder(state: &mut State, left: &Value, right: &Value) -> Result<Value, Error> {
    if let Some(format) = left.as_str() {
        return formatted(state, left, format, right);
    }
    for value in [left, right] {
        if !matches!(value.kind(), ValueKind::Number | ValueKind::Bool) {
            return Err(refused(format!(
                "% of a value of type {}: expected numbers, or a text before it",
                value.kind()
            )));
        }
    }
    let whole = |value: &Value| match value.is_integer() || value.kind() == ValueKind::Bool {
        true => i128::try_from(value.clone()).ok(),
        false => None,
    };
    match (whole(left), whole(right)) {
        (Some(_), Some(0)) => Err(refused("% by zero")),
        (Some(left), Some(right)) => {
            let remainder = left.checked_rem(right).unwrap_or(0);
            let opposite = remainder != 0 && (remainder < 0) != (right < 0);
            Ok(Value::from(if opposite { remainder + right } else { remainder }))
        }
        _ => {
            let (left, right) = (f64::try_from(left.clone())?, f64::try_from(right.clone())?);
            match left % right {
                _ if right == 0.0 => Err(refused("% by zero")),
                0.0 => Ok(0.0f64.copysign(right).into()),
                remainder if (remainder < 0.0) != (right < 0.0) => Ok((remainder + right).into()),
                remainder => Ok(remainder.into()),
            }
        }
    }
}

/// A tuple has a value for each field; anything else is the only value.
fn formatted(state: &mut State, left: &Value, format: &str, right: &Value) -> Result<Value, Error> {
    let tuple = right.downcast_object_ref::<Tuple>();
    let values = tuple.map_or_else(|| vec![right.clone()], |values| values.to_vec());
    pay_for_format(state, format, '%', &values)?;
    let fields = format.matches('%').count() - 2 * format.matches("%%").count();
    // As in Python a list or a dictionary may be left over.
    let container = tuple.is_none() && matches!(right.kind(), ValueKind::Map | ValueKind::Seq);
    if values.len() > fields && !container {
        return Err(refused(format!("a format of {fields} fields for {} values", values.len())));
    }
    filters::format(state, left, Rest(values.into_iter().map(ValueOrKwargs::from).collect()))
}

#[cfg(test)]
mod tests {
    use crate::chat::{ChatTemplate, Message};

    /// As `apply_chat_template` of transformers 5.24 writes them; none where it fails.
    #[rustfmt::skip]
    const EXPRESSIONS: [(&str, Option<&str>); 36] = [
        ("'%s' % 'a'", Some("a")),
        ("'%s %s' % ('a', 2)", Some("a 2")),
        ("'%d%%' % 3", Some("3%")),
        ("'%5.2f|%-6s|%06d' % (3.14159, 'ab', 42)", Some(" 3.14|ab    |000042")),
        ("'%(a)s %(b)d' % {'a': 'x', 'b': 3}", Some("x 3")),
        ("'%s' % {'a': 1}", Some("{'a': 1}")),
        ("'%s' % [1, 'a']", Some("[1, 'a']")),
        ("'%s' % none", Some("None")),
        ("'%s' % true", Some("True")),
        ("'%s' % 'a' ~ 'b'", Some("ab")),
        ("('%s' % 'a').upper()", Some("A")),
        ("'%s' % 'a' * 2", Some("aa")),
        ("'%+d % d' % (3, 4)", Some("+3  4")),
        ("'%s' % ('a',)", Some("a")),
        ("'%.3s' % 'abcdef'", Some("abc")),
        ("'%s' % messages[0].role", Some("user")),
        ("(messages[0].role ~ ' %s') % messages|length", Some("user 1")),
        ("'%s' % '%s' % 'b'", Some("b")),
        ("'abc' % ()", Some("abc")),
        ("'abc' % {'a': 1}", Some("abc")),
        ("'abc' % 'x'", None),
        ("'%s %s' % 'a'", None),
        ("'%s' % ('a', 'b')", None),
        ("'%(a)s' % {'b': 1}", None),
        ("'%(a)s' % 'b'", None),
        ("7 % 3", Some("1")),
        ("-7 % 3", Some("2")),
        ("7 % -3", Some("-2")),
        ("6 % -3", Some("0")),
        ("7.5 % 2", Some("1.5")),
        ("-7.5 % 2", Some("0.5")),
        ("true % 2", Some("1")),
        ("2 * 5 % 4 + 1", Some("3")),
        ("7 % 0", None),
        ("7 % 0.0", None),
        ("[1] % 2", None),
    ];

    #[test]
    fn the_operator_is_pythons() {
        for (expression, wanted) in EXPRESSIONS {
            let template = format!("{{{{ {expression} }}}}");
            let chat = ChatTemplate::with_tokens(&template, String::new(), String::new()).unwrap();
            let text = chat.prompt(&[Message::user("Hi")]);
            assert_eq!(text.as_deref().ok(), wanted, "{expression}: {text:?}");
        }
    }
}
