//! Options of a run that choose among names, and their names on the command line, in TOML and in run.json.

use crate::options::Count;
use crate::output::printable;
use anyhow::{Result, bail};
use clap::ValueEnum;
use hydra_runtime::adapter::{GateKind, HeadInit, Method};
use hydra_runtime::projection::Projection;
use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

/// `--method`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MethodName {
    /// HydraLoRA: one shared A, several B, a learned router
    Hydra,
    /// LoRA: one A and one B
    Lora,
    /// LoRA-Split: an A and a B for each label
    Split,
}

impl From<MethodName> for Method {
    fn from(name: MethodName) -> Self {
        match name {
            MethodName::Hydra => Method::Hydra,
            MethodName::Lora => Method::Lora,
            MethodName::Split => Method::Split,
        }
    }
}

/// `--gate`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GateName {
    /// A learned softmax of each token's input
    Router,
    /// The head of the record's label
    Label,
    /// The mean of the heads
    Uniform,
}

impl From<GateName> for GateKind {
    fn from(name: GateName) -> Self {
        match name {
            GateName::Router => GateKind::Router,
            GateName::Label => GateKind::Label,
            GateName::Uniform => GateKind::Uniform,
        }
    }
}

/// `--head-init`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HeadInitName {
    /// B starts at zero, as in LoRA
    Zero,
    /// The heads' B start at random values whose sum is zero, as in R-LoRA
    Random,
}

impl From<HeadInitName> for HeadInit {
    fn from(name: HeadInitName) -> Self {
        match name {
            HeadInitName::Zero => HeadInit::Zero,
            HeadInitName::Random => HeadInit::Random,
        }
    }
}

/// `--schedule`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LrSchedule {
    /// Constant
    Constant,
    /// Linear decay to 0
    Linear,
    /// Cosine decay to 0
    Cosine,
}

/// `--heads`
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Heads {
    /// As many as the training records have clusters.
    Auto,
    /// This many.
    Number(Count),
}

const HEADS: &str = "a whole number from 1, or auto";

impl FromStr for Heads {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            number => number.parse().map(Self::Number).map_err(|_| format!("expected {HEADS}")),
        }
    }
}

impl Serialize for Heads {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::Number(number) => number.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Heads {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = serde_json::Value::deserialize(deserializer)?;
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        text.parse()
            .map_err(|expected| D::Error::custom(format!("{expected}, found {}", printable(&value.to_string()))))
    }
}

/// `--targets`: adapted projections in canonical order; written `q,v` or `all`, and in TOML also as a list of names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Targets(pub Vec<Projection>);

impl Targets {
    fn of<'n>(names: impl IntoIterator<Item = &'n str>) -> Result<Self> {
        let mut targets = Vec::new();
        for name in names {
            match Projection::parse(name.trim()) {
                Some(projection) => targets.push(projection),
                None => bail!("expected all, or some of q, k, v, o, gate, up, down, found \"{}\"", printable(name)),
            }
        }
        targets.sort();
        targets.dedup();
        Ok(Self(targets))
    }
}

impl FromStr for Targets {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "all" => Ok(Self(Projection::ALL.to_vec())),
            names => Self::of(names.split(',')),
        }
    }
}

impl fmt::Display for Targets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == Projection::ALL {
            return f.write_str("all");
        }
        let names: Vec<_> = self.0.iter().map(|target| target.name().trim_end_matches("_proj")).collect();
        f.write_str(&names.join(","))
    }
}

impl Serialize for Targets {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Targets {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let names: Vec<String> = crate::options::one_or_many(deserializer)?;
        let targets = match names.as_slice() {
            [names] => names.parse(),
            names => Self::of(names.iter().map(String::as_str)),
        };
        targets.map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_read_and_written_alike() {
        let targets: Targets = "v,q".parse().unwrap();
        assert_eq!(targets, serde_json::from_str(r#"["q_proj", "v", "q"]"#).unwrap());
        assert_eq!(targets, serde_json::from_str(r#""q,v""#).unwrap());
        assert_eq!(serde_json::to_string(&targets).unwrap(), r#""q,v""#);
        assert_eq!("all".parse::<Targets>().unwrap().to_string(), "all");
        assert!("q,z".parse::<Targets>().unwrap_err().to_string().ends_with("found \"z\""));
    }

    #[test]
    fn heads_are_a_number_or_auto() {
        assert_eq!(serde_json::from_str::<Heads>("4").unwrap(), "4".parse().unwrap());
        assert_eq!(serde_json::from_str::<Heads>("\"auto\"").unwrap(), Heads::Auto);
        for wrong in ["0", "\"some\"", "1.5"] {
            let error = serde_json::from_str::<Heads>(wrong).unwrap_err().to_string();
            assert_eq!(error, format!("expected a whole number from 1, or auto, found {wrong}"));
        }
    }
}
