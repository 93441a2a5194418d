//! What goes to stdout and stderr, and into the files that options name.

use anyhow::{Context, Result, anyhow, bail};
use hydra_runtime::atomic::{try_beside, write_atomically};
pub use hydra_runtime::printable;
use serde::Serialize;
use std::collections::BTreeSet;
use std::fmt::Display;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// The name of stdout as a file. Where stdout is a regular file, that must not be replaced.
const STDOUT: &str = "/dev/stdout";

/// Whether nothing is printed.
static QUIET: AtomicBool = AtomicBool::new(false);

/// From now on nothing is printed, or everything again: another process does it for this one.
pub fn be_quiet(quiet: bool) {
    QUIET.store(quiet, Ordering::Relaxed);
}

/// Whether nothing is printed.
pub fn is_quiet() -> bool {
    QUIET.load(Ordering::Relaxed)
}

/// Prints on stdout, and returns whether there still is a reader. That there is none (`| head -1`) is not an error; a full disk is.
pub fn print(text: impl Display) -> Result<bool> {
    if is_quiet() {
        return Ok(true);
    }
    let mut out = std::io::stdout().lock();
    match write!(out, "{text}").and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error).context("can't write to stdout"),
    }
}

/// Prints on stderr. Errors are ignored, so that a run continues when its log can't be written any more (`2>&1 | head`).
pub fn say(text: impl Display) {
    if is_quiet() {
        return;
    }
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// Warns on stderr; about the same thing only once, however often it is met.
pub fn warn(text: &str) {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    if SAID.lock().is_ok_and(|mut said| said.insert(text.to_string())) {
        say(format_args!("warning: {text}"));
    }
}

/// A text on one line of a terminal: control characters are escaped.
pub fn escaped(text: &str) -> String {
    let escape = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(escape).collect()
}

/// A table as text: the first column is aligned left, the others right.
pub fn text_table(head: &[String], rows: &[Vec<String>]) -> String {
    let rows: Vec<Vec<String>> = [head]
        .into_iter()
        .chain(rows.iter().map(Vec::as_slice))
        .map(|row| row.iter().map(|cell| escaped(cell)).collect())
        .collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |row: &[String]| {
        let cells = row.iter().zip(&widths).enumerate();
        let cells = cells.map(|(i, (cell, &w))| if i == 0 { format!("{cell:<w$}") } else { format!("{cell:>w$}") });
        cells.collect::<Vec<_>>().join("  ")
    };
    rows.iter().map(|row| line(row) + "\n").collect()
}

/// A text in Markdown, on one line, that shows what it is: nothing in it is markup.
pub fn markdown(text: &str) -> String {
    let letters: Vec<char> = escaped(text).chars().collect();
    let word = |place: Option<usize>| place.and_then(|i| letters.get(i)).is_some_and(|c| c.is_alphanumeric());
    let mut safe = String::new();
    for (i, &c) in letters.iter().enumerate() {
        let marks = match c {
            '\\' | '|' | '<' | '&' | '`' | '*' | '~' => true,
            // Within a word it is a letter.
            '_' => !word(i.checked_sub(1)) || !word(Some(i + 1)),
            // The end of a link's text.
            ']' => letters.get(i + 1) == Some(&'('),
            _ => false,
        };
        safe.extend(marks.then_some('\\'));
        safe.push(c);
    }
    safe
}

/// A table in Markdown.
pub fn markdown_table(head: &[String], lines: &[Vec<String>]) -> String {
    let line = |cells: &[String]| {
        let cells: Vec<String> = cells.iter().map(|cell| markdown(cell)).collect();
        format!("| {} |\n", cells.join(" | "))
    };
    let rule: Vec<String> =
        head.iter().enumerate().map(|(i, _)| if i == 0 { "---" } else { "---:" }.to_string()).collect();
    line(head) + &line(&rule) + &lines.iter().map(|cells| line(cells)).collect::<String>()
}

/// `result`, whose error names `to` where it named the temporary `from`, which its reader doesn't know.
pub fn named<T>(result: Result<T>, from: &Path, to: &Path) -> Result<T> {
    let from = from.display().to_string();
    result.map_err(|error| match crate::chain(&error) {
        text if text.contains(&from) => anyhow!(text.replace(&from, &to.display().to_string())),
        _ => error,
    })
}

/// Whether two paths name the same file, which need not exist yet.
pub fn same_place(a: &Path, b: &Path) -> bool {
    let whole = |path: &Path| {
        let there = path.canonicalize();
        there.or_else(|_| {
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
            Ok::<_, std::io::Error>(parent.canonicalize()?.join(path.file_name().unwrap_or_default()))
        })
    };
    a == b || matches!((whole(a), whole(b)), (Ok(a), Ok(b)) if a == b)
}

/// Fails if results can't be written to the files of `options`, if two are the same, or if one is read: checked before the work, so
/// that it isn't done in vain. `inputs` are the files and folders that are read.
pub fn writable(options: &[(&str, Option<&PathBuf>)], inputs: &[Option<&Path>]) -> Result<()> {
    let given: Vec<_> = options.iter().filter_map(|&(option, path)| Some((option, path?))).collect();
    for (i, &(option, path)) in given.iter().enumerate() {
        if let Some((other, _)) = given[..i].iter().find(|(_, other)| same_place(other, path)) {
            bail!("{other} and {option} are both {}: give two files", path.display());
        }
        if inputs.iter().flatten().any(|input| reads(input, path)) {
            bail!("{option} {}: this file is read; give another one", path.display());
        }
        can_write(path)?;
    }
    Ok(())
}

/// Whether `path` is `input`, or a file that a model, an adapter or a data set has in the folder `input`.
fn reads(input: &Path, path: &Path) -> bool {
    if same_place(input, path) {
        return true;
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let types = [".safetensors", ".gguf", ".csv", ".parquet", ".jinja", ".index.json", "config.json", "tokenizer.json"];
    let inside = || Some(path.canonicalize().ok()?.starts_with(input.canonicalize().ok()?));
    types.iter().any(|end| name.ends_with(end)) && inside().unwrap_or(false)
}

fn can_write(path: &Path) -> Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if path.is_dir() || !parent.is_dir() {
        bail!("can't write {}: {}", path.display(), if path.is_dir() { "it is a folder" } else { "no such folder" });
    }
    if path == Path::new(STDOUT) || (path.exists() && !path.is_file()) {
        return Ok(());
    }
    try_beside(path).context("can't write")
}

/// `hydra` and its arguments, quoted for a shell.
pub fn command_line(words: &[String]) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_./=,:@%+-".contains(c);
    let quoted = words.iter().map(|word| match word.chars().all(plain) && !word.is_empty() {
        true => word.clone(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    });
    std::iter::once("hydra".to_string()).chain(quoted).collect::<Vec<_>>().join(" ")
}

/// Writes a file, whole or not at all. What is not a regular file (a pipe, a terminal) is written to, not replaced; /dev/stdout
/// is this process's stdout, whatever that is.
pub fn write(path: &Path, text: &str) -> Result<()> {
    if path == Path::new(STDOUT) {
        return print(text).map(drop);
    }
    if path.exists() && !path.is_file() {
        return std::fs::write(path, text).with_context(|| format!("can't write {}", path.display()));
    }
    write_atomically(path, text.as_bytes()).context("can't write")
}

/// Writes JSON for people and programs, whole or not at all.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    write(path, &(serde_json::to_string_pretty(value)? + "\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_on_their_line() {
        assert_eq!(escaped("ü 漢\n\u{1b}[31m"), "ü 漢\\n\\u{1b}[31m");
    }

    #[test]
    fn a_shell_reads_a_command_line_back() {
        let words = ["--data".to_string(), "my 'data'.jsonl".into(), "--lr=1e-3".into(), String::new()];
        let line = command_line(&words);
        assert_eq!(line, r"hydra --data 'my '\''data'\''.jsonl' --lr=1e-3 ''");
    }

    #[test]
    fn tables_keep_their_lines() {
        let table = text_table(&["a".into(), "b".into()], &[vec!["x\u{1b}\n".into(), "1".into()]]);
        assert_eq!(table, "a          b\nx\\u{1b}\\n  1\n");
    }

    #[test]
    fn names_are_no_markdown() {
        let plain = "closed_qa, 1.5 ± 0.1, -0.1 [-0.2, +0.1], (a) #1";
        assert_eq!(markdown(plain), plain);
        assert_eq!(markdown("a\\|b <i> &lt; `x` *y* ~z~ __w__\n"), r"a\\\|b \<i> \&lt; \`x\` \*y\* \~z\~ \_\_w\_\_\\n");
        assert_eq!(markdown("[x](http://y)"), r"[x\](http://y)");
        let table = markdown_table(&["a|".into()], &[vec!["b\\|".into()]]);
        assert_eq!(table, "| a\\| |\n| --- |\n| b\\\\\\| |\n");
    }

    #[test]
    fn temporary_names_are_not_shown() {
        let named = |text: &'static str| {
            named(Err::<(), _>(anyhow!(text)).context("c"), Path::new("/t/.tmp"), Path::new("out"))
        };
        assert_eq!(format!("{:#}", named("/t/.tmp/file: full").unwrap_err()), "c: out/file: full");
        assert_eq!(format!("{:#}", named("other").unwrap_err()), "c: other");
    }

    #[cfg(unix)]
    #[test]
    fn what_is_no_file_is_not_replaced() {
        use std::os::unix::fs::FileTypeExt;
        write(Path::new("/dev/null"), "x").unwrap();
        assert!(std::fs::metadata("/dev/null").unwrap().file_type().is_char_device());
    }
}
