//! What the measuring examples are asked for: `key=value` on the command line.

use hydra_runtime::backend::cpu::Precision;
use std::collections::HashMap;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

pub struct Settings(pub HashMap<String, String>);

impl Settings {
    /// Fails if an argument isn't `key=value` with one of the `known` keys.
    pub fn new(arguments: &[String], known: &[&str]) -> Result<Self> {
        let pair = |text: &String| text.split_once('=').map(|(key, value)| (key.to_string(), value.to_string()));
        let pairs: Option<HashMap<_, _>> = arguments.iter().map(pair).collect();
        let pairs = pairs.ok_or("expected key=value")?;
        match pairs.keys().find(|key| !known.contains(&key.as_str())) {
            Some(key) => Err(format!("{key}: expected one of {}", known.join(", ")).into()),
            None => Ok(Self(pairs)),
        }
    }

    pub fn get<'a>(&'a self, key: &str, default: &'a str) -> &'a str {
        self.0.get(key).map_or(default, String::as_str)
    }

    pub fn number(&self, key: &str, default: usize) -> Result<usize> {
        let Some(text) = self.0.get(key) else { return Ok(default) };
        text.parse().map_err(|_| format!("{key}={text}: expected a number").into())
    }

    /// `None` is as many as the machine has.
    pub fn threads(&self) -> Result<Option<usize>> {
        Ok(Some(self.number("threads", 0)?).filter(|&threads| threads > 0))
    }

    pub fn precision(&self, default: &str) -> Result<Precision> {
        let name = self.get("precision", default);
        Precision::parse(name).ok_or_else(|| format!("precision={name}: expected f32, bf16 or q8").into())
    }

    /// The number of the GPU, or `None` for the CPU.
    pub fn gpu(&self) -> Result<Option<&str>> {
        match self.get("device", "cpu") {
            "cpu" => Ok(None),
            device => match device.strip_prefix("cuda:").filter(|_| cfg!(feature = "cuda")) {
                Some(ordinal) => Ok(Some(ordinal)),
                None => Err(format!("device={device}: expected cpu, or cuda:0 in a build with --features cuda").into()),
            },
        }
    }
}
