//! Numbers that options take. Each type has its range, and is read alike from the command line ([`FromStr`]) and from TOML or
//! JSON (serde).

use serde::de::{Deserialize, Deserializer, Error as _, Visitor};
use serde::{Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

/// A mistake in how a command was called: exit code 2.
#[derive(Debug)]
pub struct Usage(pub String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// The numbers of type `$number` for which `$in_range` holds.
macro_rules! number {
    ($(#[$doc:meta])* $name:ident($number:ty), $expected:literal, $in_range:expr) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq)]
        pub struct $name($number);

        impl $name {
            /// The number; panics if it is out of range: for constants and for what is in range by construction.
            pub fn new(number: $number) -> Self {
                let in_range: fn(&$number) -> bool = $in_range;
                assert!(in_range(&number), "{number} is not {}", $expected);
                Self(number)
            }

            /// The number.
            pub fn get(self) -> $number {
                self.0
            }
        }

        impl FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                let in_range: fn(&$number) -> bool = $in_range;
                text.parse().ok().filter(in_range).map(Self).ok_or_else(|| concat!("expected ", $expected).to_string())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                self.0.serialize(serializer)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_any(Number::<$name> { expected: $expected, read: FromStr::from_str })
            }
        }
    };
}

/// Reads a number by its text, so that there is one check of its range.
struct Number<T> {
    expected: &'static str,
    read: fn(&str) -> Result<T, String>,
}

impl<T> Number<T> {
    fn read<E: serde::de::Error>(&self, number: impl fmt::Display) -> Result<T, E> {
        (self.read)(&number.to_string()).map_err(|expected| E::custom(format!("{expected}, found {number}")))
    }
}

impl<'de, T> Visitor<'de> for Number<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expected)
    }

    fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<T, E> {
        self.read(number)
    }

    fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<T, E> {
        self.read(number)
    }

    fn visit_f64<E: serde::de::Error>(self, number: f64) -> Result<T, E> {
        self.read(number)
    }
}

number! {
    /// A whole number from 1.
    Count(usize), "a whole number from 1", |&n| n > 0
}

/// A whole number, as clap's `value_parser`.
pub fn whole(text: &str) -> Result<usize, String> {
    text.parse().map_err(|_| "expected a whole number from 0".to_string())
}

number! {
    /// Where random numbers start.
    Seed(u64), "a whole number from 0 to 18446744073709551615", |_| true
}

number! {
    /// A number from 0 that f32 holds, too: neither infinite nor rounded to 0 there.
    NonNegative(f64), "a number from 0, within the range of f32",
    |&x| (x as f32).is_finite() && x >= 0.0 && (x == 0.0 || x as f32 > 0.0)
}

number! {
    /// A part of a whole, but neither nothing nor all.
    Share(f64), "a number between 0 and 1", |&x| x > 0.0 && x < 1.0
}

number! {
    /// A number that is finite as f32.
    Finite(f64), "a number within the range of f32", |&x| (x as f32).is_finite()
}

impl NonNegative {
    /// As f32.
    pub fn f32(self) -> f32 {
        self.0 as f32
    }
}

impl Finite {
    /// As f32.
    pub fn f32(self) -> f32 {
        self.get() as f32
    }
}

/// A list that may also be written as a single value: `data = "train.jsonl"`.
pub fn one_or_many<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Vec<T>, D::Error> {
    #[derive(serde::Deserialize)]
    #[serde(untagged)]
    enum OneOrMany<T> {
        One(T),
        Many(Vec<T>),
    }
    match OneOrMany::deserialize(deserializer) {
        Ok(OneOrMany::One(value)) => Ok(vec![value]),
        Ok(OneOrMany::Many(values)) => Ok(values),
        Err(_) => Err(D::Error::custom("expected a string or a list of strings")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_hold_on_the_command_line_and_in_files() {
        assert_eq!("8".parse::<Count>().unwrap().get(), 8);
        assert_eq!(serde_json::from_str::<Count>("8").unwrap().get(), 8);
        for wrong in ["0", "-1", "1.5"] {
            assert_eq!(wrong.parse::<Count>().unwrap_err(), "expected a whole number from 1");
            let error = serde_json::from_str::<Count>(wrong).unwrap_err().to_string();
            assert!(error.starts_with(&format!("expected a whole number from 1, found {wrong}")), "{error}");
        }
        let error = serde_json::from_str::<Count>("\"x\"").unwrap_err().to_string();
        assert!(error.starts_with("invalid type: string \"x\", expected a whole number from 1"), "{error}");
        assert_eq!("18446744073709551615".parse::<Seed>().unwrap().get(), u64::MAX);
        for wrong in ["-1e-3", "nan", "inf", "1e39", "1e-60"] {
            assert!(wrong.parse::<NonNegative>().is_err(), "{wrong}");
        }
        assert_eq!(serde_json::from_str::<NonNegative>("1").unwrap().get(), 1.0);
        assert_eq!("-2".parse::<Finite>().unwrap().f32(), -2.0);
        assert!("nan".parse::<Finite>().is_err());
    }
}
