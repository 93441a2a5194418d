//! jinja2's `cycler` and `joiner`. Neither holds anything that can hold one of them: nothing is in itself, or deep.

use super::cost::{Size, refused};
use minijinja::value::{Kwargs, Object, ObjectRepr, Rest, Value, from_args};
use minijinja::{Error, ErrorKind, State};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// `cycler(*items)`: `next()` goes through the items again and again.
#[derive(Debug)]
struct Cycler {
    items: Vec<Value>,
    place: AtomicUsize,
}

/// A new one. Fails without items.
pub(super) fn cycler(state: &State, items: Rest<Value>) -> Result<Value, Error> {
    if items.is_empty() {
        return Err(refused("cycler: expected at least one value"));
    }
    let mut size = Size::default();
    for item in items.iter() {
        size.add(item, 1)?;
    }
    size.pay(state)?;
    if size.objects {
        return Err(refused("cycler: expected texts, numbers, lists and maps"));
    }
    Ok(Value::from_object(Cycler { items: items.0, place: AtomicUsize::new(0) }))
}

impl Object for Cycler {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        let place = self.place.load(Ordering::Relaxed);
        (key.as_str() == Some("current")).then(|| self.items[place].clone())
    }

    fn call_method(self: &Arc<Self>, _: &mut State, method: &str, arguments: &[Value]) -> Result<Value, Error> {
        let () = from_args(arguments)?;
        let place = self.place.load(Ordering::Relaxed);
        match method {
            "next" => {
                self.place.store((place + 1) % self.items.len(), Ordering::Relaxed);
                Ok(self.items[place].clone())
            }
            "reset" => {
                self.place.store(0, Ordering::Relaxed);
                Ok(Value::from(()))
            }
            _ => Err(Error::new(ErrorKind::UnknownMethod, format!("a cycler has no method {method}"))),
        }
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<cycler>")
    }
}

/// `joiner(sep)`: a call gives the separator, but for the first one, which gives nothing.
#[derive(Debug)]
struct Joiner {
    separator: String,
    used: AtomicBool,
}

/// A new one.
pub(super) fn joiner(sep: Option<String>, more: Kwargs) -> Result<Value, Error> {
    let named = sep.map_or_else(|| more.get::<Option<String>>("sep"), |sep| Ok(Some(sep)))?;
    more.assert_all_used()?;
    let separator = named.unwrap_or_else(|| ", ".into());
    Ok(Value::from_object(Joiner { separator, used: AtomicBool::new(false) }))
}

impl Object for Joiner {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn call(self: &Arc<Self>, _: &mut State, arguments: &[Value]) -> Result<Value, Error> {
        let () = from_args(arguments)?;
        let used = self.used.swap(true, Ordering::Relaxed);
        Ok(Value::from(if used { self.separator.as_str() } else { "" }))
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<joiner>")
    }
}

#[cfg(test)]
mod tests {
    use crate::chat::{ChatTemplate, Message};

    /// As `apply_chat_template` of transformers 5.24 writes them.
    #[test]
    fn objects_are_jinja2s() {
        let turns = [Message::user("a"), Message::assistant("b"), Message::user("c")];
        for (template, wanted) in [
            ("{% set c = cycler('a', 2) %}{% for m in messages %}{{ c.next() }}{% endfor %}{{ c.current }}", "a2a2"),
            ("{% set c = cycler(*['a', 'b']) %}{{ c.next() }}{{ c.reset() }}{{ c.current }}", "aNonea"),
            ("{% set j = joiner() %}{% for m in messages %}{{ j() }}{{ m.content }}{% endfor %}", "a, b, c"),
            ("{% set j = joiner(sep='|') %}{{ j() }}a{{ j() }}b{{ j() }}", "a|b|"),
            ("{{ cycler is defined and joiner is defined }}", "True"),
            ("{% set n = namespace({'a': 1}, b=2) %}{{ n.a }}{{ n.b }}", "12"),
            ("{% set n = namespace([('a', 1)]) %}{{ n.a }}{{ dict([('a', 1)], b=2) }}", "1{'a': 1, 'b': 2}"),
            ("{% set n = namespace(x='') %}{% set n.x %}a{{ 1 }}{% endset %}{{ n.x }}{{ n.y is defined }}", "a1False"),
            (
                "{{ none is iterable }}{{ nothing is iterable }}{{ 'a' is iterable }}{{ 1 is iterable }}",
                "FalseTrueTrueFalse",
            ),
            ("{% if tools is iterable and tools | length > 0 %}tools{% endif %}", ""),
            ("{{ 'x' | float }}{{ 'x' | float(2.5) }}{{ '1.5' | float }}{{ none | float }}", "0.02.51.50.0"),
        ] {
            let chat = ChatTemplate::with_tokens(template, String::new(), String::new()).unwrap();
            let text = chat.prompt(&turns).map_err(|error| error.to_string());
            assert_eq!(text.as_deref(), Ok(wanted), "{template}");
        }
        for template in
            ["{{ cycler() }}", "{{ joiner(1, 2) }}", "{{ cycler(1).last() }}", "{{ dict([1]) }}", "{{ dict([[1]]) }}"]
        {
            let chat = ChatTemplate::with_tokens(template, String::new(), String::new()).unwrap();
            assert!(chat.prompt(&turns).is_err(), "{template}");
        }
    }
}
