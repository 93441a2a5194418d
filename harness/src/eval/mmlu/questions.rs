//! MMLU's files: the folders of the original distribution, one file of JSON lines, or the data set cais/mmlu of the Hugging Face
//! hub.
//!
//! ```text
//! DIR/test/{subject}_test.csv, DIR/dev/{subject}_dev.csv     no header: question, A, B, C, D, answer letter
//! DIR/mmlu.jsonl                                             {"split": "test" or "dev", "subject", "question", "choices": [4], "answer": "A"}
//! DIR/test-*.parquet, DIR/dev-*.parquet, or in DIR/all/      {"subject", "question", "choices": [4], "answer": 0}
//! cais/mmlu                                                  the same, downloaded
//! ```
//! A single file may be either of the last two; what names no split is to be asked.
//! `dev` has the exemplars; it is read only if `--shots` asks for them.

use super::{LETTERS, Style, helm};
use crate::data::file::{JsonFile, bad_json, unpacked};
use crate::data::table;
use crate::hub::{is_hub_name, locate_data};
use crate::output::printable;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The questions to ask, and the exemplars.
const TEST: &str = "test";
const DEV: &str = "dev";

/// The file of JSON lines in a folder.
pub const JSON_LINES: &str = "mmlu.jsonl";

/// One question with its four choices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Its text.
    pub question: String,
    /// The choices A to D.
    pub choices: [String; 4],
    /// Index of the right choice.
    pub answer: usize,
}

/// A subject's questions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Subject {
    /// As in the files' names: "high_school_physics".
    pub name: String,
    /// Exemplars.
    pub dev: Vec<Question>,
    /// Questions to ask.
    pub test: Vec<Question>,
}

/// A line of [`JSON_LINES`].
#[derive(Serialize, Deserialize)]
pub struct Line {
    /// "test" or "dev".
    pub split: String,
    /// The subject's name.
    pub subject: String,
    /// The question's text.
    pub question: String,
    /// The choices A to D.
    pub choices: [String; 4],
    /// The letter of the right choice.
    pub answer: String,
}

/// A question as it is read.
#[derive(Deserialize)]
struct Row {
    split: Option<String>,
    subject: String,
    question: String,
    choices: [String; 4],
    answer: Answer,
}

/// A letter, or an index from 0.
#[derive(Deserialize)]
#[serde(untagged)]
enum Answer {
    Letter(String),
    Index(i64),
}

/// Which questions to take.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Exemplars in each prompt.
    pub shots: usize,
    /// The most questions per subject.
    pub limit: Option<usize>,
    /// Only these subjects.
    pub subjects: Option<Vec<String>>,
    /// Whose choice of exemplars.
    pub style: Option<Style>,
}

/// Reads a folder (or a file of JSON lines), subjects sorted by name.
pub fn read(path: &Path, selection: &Selection) -> Result<Vec<Subject>> {
    let name = path.display();
    let mut subjects = if path.is_file() {
        read_lines(&[(TEST, path.to_path_buf())])?
    } else if path.join("test").is_dir() {
        read_folders(path, selection)?
    } else if path.join(JSON_LINES).is_file() {
        read_lines(&[(TEST, path.join(JSON_LINES))])?
    } else if let Some(files) = parquet_files(path)? {
        read_lines(&files)?
    } else if path.is_dir() {
        bail!(
            "{name}: expected a folder test/ of CSV files, {JSON_LINES}, or test-*.parquet; `hydra fetch mmlu` writes the second"
        );
    } else if path.to_str().is_some_and(is_hub_name) {
        read_lines(&download(&name.to_string(), selection.shots > 0)?)?
    } else {
        bail!("{name}: no such folder or file; `hydra fetch mmlu` writes a folder");
    };
    if let Some(wanted) = &selection.subjects {
        let known = |name: &String| subjects.contains_key(name);
        if let Some(unknown) = wanted.iter().find(|name| !known(name)) {
            bail!("--subjects: {name} has no subject {unknown:?}");
        }
        subjects.retain(|name, _| wanted.contains(name));
    }
    let mut read = Vec::new();
    for (_, mut subject) in subjects {
        let (shots, found) = (selection.shots, subject.dev.len());
        if found < shots {
            bail!(
                "{name}: --shots {shots} needs {shots} exemplars (dev) for {}, found {found}",
                printable(&subject.name)
            );
        }
        match selection.style {
            Some(Style::Helm) => {
                let answers: Vec<&str> = subject.dev.iter().map(|own| own.choices[own.answer].as_str()).collect();
                let taken = helm::exemplars(&answers, shots);
                let exemplar = |question: &Question| {
                    let answer = helm::same(&question.choices, question.answer);
                    Question { answer, ..question.clone() }
                };
                subject.dev = taken.into_iter().map(|place| exemplar(&subject.dev[place])).collect();
            }
            Some(Style::LmEval | Style::Hendrycks | Style::Opencompass) | None => subject.dev.truncate(shots),
        }
        subject.test.truncate(selection.limit.unwrap_or(usize::MAX));
        read.push(subject);
    }
    if let Some(empty) = read.iter().find(|subject| selection.subjects.is_some() && subject.test.is_empty()) {
        bail!("{name}: no questions in --subjects {:?}", empty.name);
    }
    read.retain(|subject| !subject.test.is_empty());
    if read.is_empty() {
        bail!("{name}: no questions");
    }
    Ok(read)
}

fn read_folders(path: &Path, selection: &Selection) -> Result<BTreeMap<String, Subject>> {
    let test = path.join("test");
    let mut subjects = BTreeMap::new();
    for entry in std::fs::read_dir(&test).with_context(|| test.display().to_string())? {
        let file = entry.with_context(|| test.display().to_string())?.path();
        let file_name = file.file_name().unwrap_or_default().to_string_lossy();
        let Some(name) = file_name.strip_suffix("_test.csv").map(str::to_owned) else { continue };
        // macOS adds "._x_test.csv" to archives.
        if name.starts_with('.') {
            continue;
        }
        let wanted = selection.subjects.as_ref().is_none_or(|wanted| wanted.contains(&name));
        let dev_file = path.join("dev").join(format!("{name}_dev.csv"));
        let dev = if wanted && selection.shots > 0 { read_csv(&dev_file)? } else { Vec::new() };
        let test = if wanted { read_csv(&file)? } else { Vec::new() };
        subjects.insert(name.clone(), Subject { name, dev, test });
    }
    Ok(subjects)
}

fn read_csv(path: &Path) -> Result<Vec<Question>> {
    let name = path.display().to_string();
    let bytes = unpacked(path).with_context(|| name.clone())?.bytes;
    let mut questions = Vec::new();
    for row in table::rows(&bytes, ',', &name)? {
        let (line, row) = row?;
        let [question, a, b, c, d, answer] = row.iter().collect::<Vec<_>>()[..] else {
            bail!("{name}:{line}: expected 6 fields (question, A, B, C, D, answer), found {}", row.len());
        };
        let choices = [a, b, c, d].map(str::to_owned);
        let answer = letter(answer).with_context(|| format!("{name}:{line}"))?;
        questions.push(Question { question: question.to_owned(), choices, answer });
    }
    Ok(questions)
}

/// Reads files of rows, each of the split that its rows name, or else of its own.
fn read_lines(files: &[(&str, PathBuf)]) -> Result<BTreeMap<String, Subject>> {
    let mut subjects: BTreeMap<String, Subject> = BTreeMap::new();
    for (split, path) in files {
        let file = JsonFile::read(path)?;
        for (number, line) in file.items() {
            let at = || format!("{}:{number}", path.display());
            let row: Row = serde_json::from_slice(line).map_err(|e| bad_json(&e)).with_context(at)?;
            let answer = match row.answer {
                Answer::Letter(text) => letter(&text),
                Answer::Index(index) => usize::try_from(index)
                    .ok()
                    .filter(|&index| index < LETTERS.len())
                    .with_context(|| format!("answer: expected 0 to 3, found {index}")),
            };
            let answer = answer.with_context(at)?;
            let subject = subjects.entry(row.subject.clone()).or_default();
            let questions = match row.split.as_deref().unwrap_or(split) {
                TEST => &mut subject.test,
                DEV => &mut subject.dev,
                other => bail!("{}: split: expected \"test\" or \"dev\", found \"{}\"", at(), printable(other)),
            };
            questions.push(Question { question: row.question, choices: row.choices, answer });
            subject.name = row.subject;
        }
    }
    Ok(subjects)
}

/// The Parquet files of both splits in a folder, or in its folder `all`; `None` if it has no test questions.
fn parquet_files(path: &Path) -> Result<Option<Vec<(&'static str, PathBuf)>>> {
    for folder in [path.to_path_buf(), path.join("all")].iter().filter(|folder| folder.is_dir()) {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(folder).with_context(|| folder.display().to_string())? {
            let file = entry.with_context(|| folder.display().to_string())?.path();
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            let own = [TEST, DEV].into_iter().find(|split| name.starts_with(split) && name.ends_with(".parquet"));
            files.extend(own.map(|split| (split, file.clone())));
        }
        if files.iter().any(|(split, _)| *split == TEST) {
            files.sort();
            return Ok(Some(files));
        }
    }
    Ok(None)
}

/// The files of a data set on the hub.
fn download(name: &str, shots: bool) -> Result<Vec<(&'static str, PathBuf)>> {
    let mut files = Vec::new();
    for split in [DEV, TEST].into_iter().filter(|split| shots || *split == TEST) {
        let own = locate_data(&[PathBuf::from(format!("{name}:all/{split}"))])?;
        files.extend(own.into_iter().map(|file| (split, file)));
    }
    Ok(files)
}

fn letter(text: &str) -> Result<usize> {
    let index = LETTERS.iter().position(|letter| text.trim() == letter.to_string());
    index.with_context(|| format!("answer: expected A, B, C or D, found \"{}\"", printable(text)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn both_layouts() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path();
        fs::create_dir_all(dir.join("test")).unwrap();
        fs::create_dir_all(dir.join("dev")).unwrap();
        fs::write(dir.join("test/x_test.csv"), "\"Is \"\"it\"\", so?\nYes\",1,2,3,4,C\r\nq,a,b,c,d,A\n").unwrap();
        fs::write(dir.join("dev/x_dev.csv"), "e,a,b,c,d,B\n").unwrap();
        fs::write(dir.join("test/._x_test.csv"), [0, 5, 0xFF]).unwrap();
        let selection = |shots| Selection { shots, ..Selection::default() };
        let subjects = read(dir, &selection(1)).unwrap();
        assert_eq!(subjects[0].test[0].question, "Is \"it\", so?\nYes");
        assert_eq!((subjects[0].test[0].answer, subjects[0].test.len(), subjects[0].dev[0].answer), (2, 2, 1));
        assert!(read(dir, &selection(2)).unwrap_err().to_string().contains("found 1"));
        let other = Selection { subjects: Some(vec!["y".into()]), ..Selection::default() };
        assert!(read(dir, &other).is_err());
        fs::write(dir.join("test/y_test.csv"), "").unwrap();
        assert!(read(dir, &other).unwrap_err().to_string().contains("no questions in --subjects \"y\""));
        fs::write(dir.join("test/x_test.csv"), "q,a,b,c,A\n").unwrap();
        assert!(read(dir, &selection(0)).unwrap_err().to_string().contains("found 5"));
        fs::write(dir.join("test/x_test.csv"), "q,a,b,c,d,E\n").unwrap();
        assert!(read(dir, &selection(0)).is_err());
        let lines = dir.join("m.jsonl");
        fs::write(&lines, r#"{"split":"test","subject":"s","question":"q","choices":["a","b","c","d"],"answer":"D"}"#)
            .unwrap();
        assert_eq!(read(&lines, &selection(0)).unwrap()[0].test[0].answer, 3);
        assert!(read(&lines, &selection(1)).is_err());
        // Rows as those of cais/mmlu, in files of their splits.
        let row = r#"{"question":"q","subject":"s","choices":["a","b","c","d"],"answer":2}"#;
        fs::create_dir_all(dir.join("hf/all")).unwrap();
        fs::write(dir.join("hf/all/test-00000-of-00001.parquet"), row).unwrap();
        fs::write(dir.join("hf/all/dev-00000-of-00001.parquet"), row.replace("2}", "1}")).unwrap();
        let subject = &read(&dir.join("hf"), &selection(1)).unwrap()[0];
        assert_eq!((subject.test[0].answer, subject.dev[0].answer), (2, 1));
        fs::write(&lines, row.replace("2}", "4}")).unwrap();
        let error = format!("{:#}", read(&lines, &selection(0)).unwrap_err());
        assert!(error.ends_with("m.jsonl:1: answer: expected 0 to 3, found 4"), "{error}");
    }
}
