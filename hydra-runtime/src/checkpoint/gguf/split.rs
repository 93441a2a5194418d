//! Models in several files, as llama.cpp's `gguf-split` writes them: `NAME-00001-of-00003.gguf` has the metadata, and each one some
//! of the tensors.

use super::container::Container;
use crate::Result;
use std::path::{Path, PathBuf};

const COUNT: &str = "split.count";
const NUMBER: &str = "split.no";
const TENSORS: &str = "split.tensors.count";
/// What five digits can say.
const MOST: usize = 99_999;

fn ending(number: usize, count: usize) -> String {
    format!("-{number:05}-of-{count:05}.gguf")
}

/// The paths of the other parts of a model, in order; `first` is the one that was opened.
pub(super) fn others(first: &Container) -> Result<impl Iterator<Item = PathBuf> + use<>> {
    let count = first.unsigned(COUNT)?.unwrap_or(1).max(1);
    let name = first.path.file_name().and_then(|name| name.to_str());
    let stem = match name.and_then(|name| name.strip_suffix(&ending(1, count))) {
        _ if count == 1 => "",
        Some(stem) if count <= MOST && first.unsigned(NUMBER)? == Some(0) => stem,
        _ => return Err(first.refuse(COUNT, &format!("the first part, named NAME{}", ending(1, count)))),
    };
    let (path, stem) = (first.path.to_path_buf(), stem.to_string());
    Ok((2..=count).map(move |number| path.with_file_name(format!("{stem}{}", ending(number, count)))))
}

/// Fails if `part` is not the one that follows the parts of `whole`.
pub(super) fn follows(part: &Container, whole: &Container) -> Result<()> {
    let number = whole.files.len();
    if part.unsigned(NUMBER)? != Some(number) {
        return Err(part.refuse(NUMBER, &number.to_string()));
    }
    match whole.unsigned(COUNT)? {
        count if part.unsigned(COUNT)? == count => Ok(()),
        count => Err(part.refuse(COUNT, &format!("{}, as in the first part", count.unwrap_or(1)))),
    }
}

/// Fails if all parts together don't have the tensors that the first one says.
pub(super) fn check(whole: &Container) -> Result<()> {
    match whole.unsigned(TENSORS)? {
        Some(tensors) if whole.files.len() > 1 && tensors != whole.tensors.len() => {
            Err(whole.refuse(TENSORS, &format!("{}, which its parts have", whole.tensors.len())))
        }
        _ => Ok(()),
    }
}

/// Whether a file's name says that it is a part, and not the first one.
pub(crate) fn is_later_part(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(".gguf"));
    let numbers = name.and_then(|name| name.rsplit_once("-of-")).and_then(|(before, _)| before.rsplit_once('-'));
    numbers.is_some_and(|(_, number)| number.len() == 5 && number.parse().is_ok_and(|number: usize| number > 1))
}
