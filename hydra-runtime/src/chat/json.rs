//! The filter `tojson` as transformers gives it to templates: Python's `json.dumps`, which writes a space behind a comma and a colon
//! and escapes nothing for HTML.

use minijinja::value::{Kwargs, Value};
use minijinja::{Error, ErrorKind};
use serde::Serialize;
use serde_json::Serializer;
use serde_json::ser::{CharEscape, CompactFormatter, Formatter};
use std::io::{self, Write};

/// Spaces by which a level is indented, and bytes of a separator.
const MOST: usize = 16;

/// How JSON is written.
#[derive(Clone)]
pub(super) struct Style {
    /// Whether other characters than ASCII's are escaped.
    ensure_ascii: bool,
    /// Spaces by which a level is indented; `None` puts all on one line.
    indent: Option<usize>,
    /// Behind a value, and behind a key.
    separators: [String; 2],
    sort_keys: bool,
    /// The level, and whether something has been written in it.
    level: usize,
    filled: bool,
}

impl Style {
    /// From the arguments of `json.dumps`.
    pub fn new(ensure_ascii: Option<bool>, indent: Option<usize>, options: &Kwargs) -> Result<Self, Error> {
        let indent = indent.map_or_else(|| options.get::<Option<usize>>("indent"), |indent| Ok(Some(indent)))?;
        let ensure_ascii = ensure_ascii.map_or_else(|| options.get("ensure_ascii"), |ascii| Ok(Some(ascii)))?;
        let separators: Option<Vec<String>> = options.get("separators")?;
        let sort_keys: Option<bool> = options.get("sort_keys")?;
        options.assert_all_used()?;
        let invalid = |why: String| Err(Error::new(ErrorKind::InvalidOperation, why));
        if indent.is_some_and(|spaces| spaces > MOST) {
            return invalid(format!("tojson indents by at most {MOST} spaces"));
        }
        let separators = match separators.map(<[String; 2]>::try_from) {
            Some(Ok(separators)) if separators.iter().all(|separator| separator.len() <= MOST) => separators,
            Some(_) => return invalid(format!("tojson takes two separators of at most {MOST} bytes")),
            None => [if indent.is_some() { "," } else { ", " }, ": "].map(Into::into),
        };
        let (ensure_ascii, sort_keys) = (ensure_ascii.unwrap_or(false), sort_keys.unwrap_or(false));
        Ok(Self { ensure_ascii, indent, separators, sort_keys, level: 0, filled: false })
    }

    /// A value's JSON.
    pub fn write(&self, value: &Value) -> Result<String, Error> {
        let refused = |error: serde_json::Error| Error::new(ErrorKind::BadSerialization, error.to_string());
        let mut text = Vec::new();
        let mut serializer = Serializer::with_formatter(&mut text, self.clone());
        if self.sort_keys {
            let mut value = serde_json::to_value(value).map_err(refused)?;
            value.sort_all_objects();
            value.serialize(&mut serializer).map_err(refused)?;
        } else {
            value.serialize(&mut serializer).map_err(refused)?;
        }
        String::from_utf8(text).map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))
    }

    fn open(&mut self, out: &mut (impl Write + ?Sized), bracket: &[u8]) -> io::Result<()> {
        self.level += 1;
        self.filled = false;
        out.write_all(bracket)
    }

    fn next(&mut self, out: &mut (impl Write + ?Sized), first: bool) -> io::Result<()> {
        if !first {
            out.write_all(self.separators[0].as_bytes())?;
        }
        self.new_line(out)
    }

    fn close(&mut self, out: &mut (impl Write + ?Sized), bracket: &[u8]) -> io::Result<()> {
        self.level -= 1;
        if self.filled {
            self.new_line(out)?;
        }
        self.filled = true;
        out.write_all(bracket)
    }

    fn new_line(&self, out: &mut (impl Write + ?Sized)) -> io::Result<()> {
        match self.indent {
            Some(spaces) => write!(out, "\n{:1$}", "", spaces * self.level),
            None => Ok(()),
        }
    }
}

impl Formatter for Style {
    fn begin_array<W: Write + ?Sized>(&mut self, out: &mut W) -> io::Result<()> {
        self.open(out, b"[")
    }

    fn end_array<W: Write + ?Sized>(&mut self, out: &mut W) -> io::Result<()> {
        self.close(out, b"]")
    }

    fn begin_array_value<W: Write + ?Sized>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.next(out, first)
    }

    fn end_array_value<W: Write + ?Sized>(&mut self, _: &mut W) -> io::Result<()> {
        self.filled = true;
        Ok(())
    }

    fn begin_object<W: Write + ?Sized>(&mut self, out: &mut W) -> io::Result<()> {
        self.open(out, b"{")
    }

    fn end_object<W: Write + ?Sized>(&mut self, out: &mut W) -> io::Result<()> {
        self.close(out, b"}")
    }

    fn begin_object_key<W: Write + ?Sized>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.next(out, first)
    }

    fn begin_object_value<W: Write + ?Sized>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(self.separators[1].as_bytes())
    }

    fn end_object_value<W: Write + ?Sized>(&mut self, _: &mut W) -> io::Result<()> {
        self.filled = true;
        Ok(())
    }

    fn write_string_fragment<W: Write + ?Sized>(&mut self, out: &mut W, text: &str) -> io::Result<()> {
        if !self.ensure_ascii {
            return out.write_all(text.as_bytes());
        }
        for c in text.chars() {
            match c.is_ascii() {
                true => out.write_all(&[c as u8])?,
                false => c.encode_utf16(&mut [0; 2]).iter().try_for_each(|unit| write!(out, "\\u{unit:04x}"))?,
            }
        }
        Ok(())
    }

    fn write_char_escape<W: Write + ?Sized>(&mut self, out: &mut W, escape: CharEscape) -> io::Result<()> {
        CompactFormatter.write_char_escape(out, escape)
    }
}
