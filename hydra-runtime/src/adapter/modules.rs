//! Which projections of which layers an adapter is on, and the rank and alpha of each, as PEFT reads them from
//! `adapter_config.json` (its `check_target_module_exists` and `get_pattern_key`).
//!
//! ```text
//! target_modules, exclude_modules    names, or ends of modules' paths; or one expression for whole paths
//! layers_to_transform                the layers that the names count in, if not all; layers_pattern says what counts as a layer
//! rank_pattern, alpha_pattern        expressions for ends of paths, each with its rank or alpha instead of r or lora_alpha
//! ```
//! Of patterns that fit one module the first counts, in the order of their names, in which PEFT writes them.

use super::pad::Own;
use crate::Result;
use crate::error::printable;
use crate::json::Object;
use crate::projection::{ByProjection, Projection};
use fancy_regex::Regex;
use serde_json::Value;

/// For each layer, rank and alpha of the adapter on each projection; `None` where there is none.
pub(super) type Placed = Vec<ByProjection<Option<Own>>>;

/// Reads a file's settings for a model of this many layers; `tensors` are the names in the tensor file. `all` is what PEFT has in
/// `r` and `lora_alpha`.
pub(super) fn placed(file: &Object, tensors: &[&str], layers: usize, all: Own) -> Result<Placed> {
    let targets = Names::read(file, "target_modules")?;
    let excluded = Names::read(file, "exclude_modules")?;
    check_names(file, &targets, tensors)?;
    let chosen = Layers::read(file)?;
    let ranks = Patterns::read(file, "rank_pattern", "positive whole numbers", |value| {
        value.as_u64().and_then(|rank| usize::try_from(rank).ok()).filter(|&rank| rank > 0)
    })?;
    let alphas = Patterns::read(file, "alpha_pattern", "numbers", |value| value.as_f64().map(|alpha| alpha as f32))?;
    let in_tensors = ByProjection::from_fn(|p| {
        let part = format!(".{}.", p.name());
        targets.is_none() && tensors.iter().any(|name| name.contains(&part))
    });
    let place = |layer: usize, projection: Projection| -> Result<Option<Own>> {
        let path = path(layer, projection);
        let adapted = match &targets {
            // A file of another program's, without a word of it.
            None => in_tensors[projection],
            Some(names) => match names.find(file, &path)? {
                Match::None => false,
                Match::End => chosen.has(file, layer, &path)?,
                Match::Whole => true,
            },
        };
        let out = match &excluded {
            Some(names) if adapted => names.find(file, &path)? != Match::None,
            _ => !adapted,
        };
        if out {
            return Ok(None);
        }
        let rank = ranks.get(file, &path)?.unwrap_or(all.rank);
        Ok(Some(Own { rank, alpha: alphas.get(file, &path)?.unwrap_or(all.alpha) }))
    };
    (0..layers).map(|layer| ByProjection::try_from_fn(|projection| place(layer, projection))).collect()
}

/// A module's path in PEFT's eyes.
fn path(layer: usize, projection: Projection) -> String {
    format!("model.layers.{layer}.{}", projection.hf_path())
}

/// Whether a path is this name, or ends in it after a dot.
fn find_end(path: &str, name: &str) -> Match {
    match path.strip_suffix(name) {
        Some("") => Match::Whole,
        Some(rest) if rest.ends_with('.') => Match::End,
        _ => Match::None,
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Match {
    None,
    /// To the end of a path: `layers_to_transform` has a say.
    End,
    Whole,
}

/// Modules, by names or by an expression.
enum Names {
    All,
    List(Vec<String>),
    Expression(Regex),
}

impl Names {
    fn read(file: &Object, key: &str) -> Result<Option<Self>> {
        Ok(match file.get(key) {
            None => None,
            Some(Value::String(all)) if all == "all-linear" => Some(Self::All),
            Some(Value::String(text)) if text.is_empty() => None,
            Some(Value::String(text)) => {
                Some(Self::Expression(expression(file, key, text, &format!("(?:{text})\\z"))?))
            }
            Some(_) => file.strings(key)?.map(Self::List),
        })
    }

    fn find(&self, file: &Object, path: &str) -> Result<Match> {
        Ok(match self {
            Self::All => Match::Whole,
            Self::Expression(expression) if matches(file, expression, path)? => Match::Whole,
            Self::Expression(_) => Match::None,
            Self::List(names) => {
                let found: Vec<Match> = names.iter().map(|name| find_end(path, name)).collect();
                let best = [Match::Whole, Match::End].into_iter().find(|best| found.contains(best));
                best.unwrap_or(Match::None)
            }
        })
    }
}

/// PEFT takes names of modules that the model lacks: they have no tensors. Others are of no projection.
fn check_names(file: &Object, targets: &Option<Names>, tensors: &[&str]) -> Result<()> {
    let Some(Names::List(names)) = targets else { return Ok(()) };
    let known = |name: &str| {
        // Of any layer: the number is in the name, if anywhere.
        let layer = name.split('.').find_map(|part| part.parse().ok()).unwrap_or(0);
        Projection::ALL.into_iter().any(|projection| find_end(&path(layer, projection), name) != Match::None)
    };
    let other = |name: &&String| !known(name) && tensors.iter().any(|tensor| tensor.contains(&format!(".{name}.")));
    match names.iter().find(other) {
        None => Ok(()),
        Some(name) => {
            let (all, found) = (Projection::ALL.map(Projection::name).join(", "), printable(name));
            Err(file.error(format!("target_modules has {found}, wanted some of {all}")))
        }
    }
}

/// `layers_to_transform` and `layers_pattern`.
struct Layers {
    /// `None` for all.
    chosen: Option<Vec<u64>>,
    patterns: Vec<Regex>,
}

impl Layers {
    fn read(file: &Object) -> Result<Self> {
        const KEY: &str = "layers_to_transform";
        let number =
            |value: &Value| value.as_u64().ok_or_else(|| file.refuse(KEY, "a layer's number or a list of them"));
        let chosen = match file.get(KEY) {
            None => None,
            Some(Value::Array(list)) if list.is_empty() => None,
            Some(Value::Array(list)) => Some(list.iter().map(number).collect::<Result<_>>()?),
            Some(one) => Some(vec![number(one)?]),
        };
        let key = "layers_pattern";
        let names = file.strings(key)?.unwrap_or_default();
        let pattern = |name: &String| expression(file, key, name, &format!("(?:.*?\\.)??{name}\\.\\d+\\."));
        let patterns = names.iter().filter(|name| !name.is_empty()).map(pattern).collect::<Result<_>>()?;
        Ok(Self { chosen, patterns })
    }

    fn has(&self, file: &Object, layer: usize, path: &str) -> Result<bool> {
        let Some(chosen) = &self.chosen else { return Ok(true) };
        let mut counts = self.patterns.is_empty();
        for pattern in &self.patterns {
            counts |= matches(file, pattern, path)?;
        }
        Ok(counts && chosen.contains(&(layer as u64)))
    }
}

/// `rank_pattern` or `alpha_pattern`.
struct Patterns<T>(Vec<(Pattern, T)>);

enum Pattern {
    /// Letters and dots, which stand for any character.
    Plain(String),
    Expression(Regex),
}

impl<T: Copy> Patterns<T> {
    fn read(file: &Object, key: &str, wanted: &str, value: impl Fn(&Value) -> Option<T>) -> Result<Self> {
        let map = file.object(key)?.map(|object| object.map).unwrap_or_default();
        let mut patterns = Vec::new();
        for (text, found) in &map {
            let value = value(found).ok_or_else(|| file.refuse(key, &format!("{wanted} by modules' names")))?;
            let plain = text.bytes().all(|c| c.is_ascii_alphanumeric() || b"_.".contains(&c));
            let pattern = if plain {
                Pattern::Plain(text.clone())
            } else {
                Pattern::Expression(expression(file, key, text, &format!("(.*\\.)?({text})\\z"))?)
            };
            patterns.push((text, (pattern, value)));
        }
        patterns.sort_by_key(|(text, _)| *text);
        Ok(Self(patterns.into_iter().map(|(_, pattern)| pattern).collect()))
    }

    fn get(&self, file: &Object, path: &str) -> Result<Option<T>> {
        for (pattern, value) in &self.0 {
            let fits = match pattern {
                Pattern::Plain(text) => is_end(path, text),
                Pattern::Expression(expression) => matches(file, expression, path)?,
            };
            if fits {
                return Ok(Some(*value));
            }
        }
        Ok(None)
    }
}

/// Whether a path ends in a plain pattern, after a dot or from its start.
fn is_end(path: &str, pattern: &str) -> bool {
    let Some(start) = path.len().checked_sub(pattern.len()) else { return false };
    let (before, end) = path.as_bytes().split_at(start);
    (before.is_empty() || before.ends_with(b".")) && end.iter().zip(pattern.bytes()).all(|(&c, p)| p == b'.' || p == c)
}

/// A regular expression that has to fit a path from its start; `text` is what the file has.
fn expression(file: &Object, key: &str, text: &str, whole: &str) -> Result<Regex> {
    let unread = |_| file.error(format!("{key} has {}, wanted a regular expression", printable(text)));
    Regex::new(&format!("\\A(?:{whole})")).map_err(unread)
}

fn matches(file: &Object, expression: &Regex, path: &str) -> Result<bool> {
    let lost = |_| file.error(format!("{} is too much work to compare with {path}", printable(expression.as_str())));
    expression.is_match(path).map_err(lost)
}
