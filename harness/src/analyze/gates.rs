//! The router in numbers, by layer and projection; every category has the same weight. With p(e | c) a category's mean gate:
//!
//! ```text
//! p(e)                 mean over categories of p(e | c)
//! entropy              of a token's gate, mean over a category's tokens, then over categories, divided by ln N: 0 for one head per
//!                      token, 1 for a uniform gate; never above the balance
//! balance              entropy of p(e), divided by ln N: 1 if all heads are used equally, 0 if one head is used alone
//! mutual information   mean over categories of Σ p(e | c) log₂ (p(e | c) / p(e)), in bits: what the head tells about the category
//! ```

use crate::eval::router::Watched;
use crate::report::Routing;
use hydra_runtime::adapter::Adapter;
use serde::Serialize;
use std::collections::BTreeMap;

/// The router of one adapter.
#[derive(Serialize)]
pub struct Gates {
    /// The adapter's name.
    pub adapter: String,
    /// Number of records and tokens, by category.
    pub watched: BTreeMap<String, Count>,
    /// By layer and projection.
    pub places: Vec<Place>,
    /// Means over `places`.
    pub mean: Numbers,
    /// Upper bound of the mutual information, in bits.
    pub most_bits: f64,
}

/// What the means are over.
#[derive(Serialize)]
pub struct Count {
    /// Number of records.
    pub records: usize,
    /// Number of tokens.
    pub tokens: usize,
}

/// A projection of a layer.
#[derive(Serialize)]
pub struct Place {
    /// The layer.
    pub layer: usize,
    /// The projection.
    pub projection: &'static str,
    /// Each category's mean gate, by head.
    pub gate: BTreeMap<String, Vec<f64>>,
    /// Entropy, balance and mutual information here.
    #[serde(flatten)]
    pub numbers: Numbers,
}

/// Entropy, balance and mutual information, as defined above.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Numbers {
    /// Entropy of a token's gate.
    pub entropy: f64,
    /// Balance of the heads.
    pub balance: f64,
    /// The largest p(e).
    pub largest: f64,
    /// Mutual information between head and category.
    pub mutual_information_bits: f64,
}

impl Gates {
    /// Adds up the mean gates of each category.
    pub fn new(name: &str, adapter: &Adapter, watched: &BTreeMap<String, Watched>) -> Self {
        let heads = adapter.config.lora_heads;
        let count = |w: &Watched| Count { records: w.records, tokens: w.tokens };
        let places = watched.values().next().map_or(0, |w| w.means.len());
        let place = |i: usize| {
            let first = &watched.values().next().expect("there is a place").means[i];
            let gate: BTreeMap<String, Vec<f64>> =
                watched.iter().map(|(category, w)| (category.clone(), w.means[i].lora_heads.clone())).collect();
            let entropy = watched.values().map(|w| w.means[i].entropy).sum::<f64>() / watched.len() as f64;
            let gates: Vec<&Vec<f64>> = gate.values().collect();
            let numbers = numbers(&gates, entropy);
            Place { layer: first.layer, projection: first.projection.name(), gate, numbers }
        };
        let places: Vec<Place> = (0..places).map(place).collect();
        let mean =
            |pick: fn(&Numbers) -> f64| places.iter().map(|p| pick(&p.numbers)).sum::<f64>() / places.len() as f64;
        let mean = Numbers {
            entropy: mean(|n| n.entropy),
            balance: mean(|n| n.balance),
            largest: mean(|n| n.largest),
            mutual_information_bits: mean(|n| n.mutual_information_bits),
        };
        Self {
            adapter: name.to_string(),
            watched: watched.iter().map(|(category, w)| (category.clone(), count(w))).collect(),
            places,
            mean,
            most_bits: (heads.min(watched.len()) as f64).log2(),
        }
    }

    /// The gate by category, layer and head, of one projection or as the mean over all.
    pub fn routing(&self, projection: Option<&str>) -> Routing {
        let mut routing = Routing::new();
        let layers = self.places.iter().map(|place| place.layer + 1).max().unwrap_or(0);
        for category in self.watched.keys() {
            let of_layer = |layer: usize| {
                let here = |p: &&Place| p.layer == layer && projection.is_none_or(|name| name == p.projection);
                let gates: Vec<&Vec<f64>> =
                    self.places.iter().filter(here).map(|place| &place.gate[category]).collect();
                means(&gates)
            };
            routing.insert(category.clone(), (0..layers).map(of_layer).collect());
        }
        routing
    }

    /// The adapted projections.
    pub fn projections(&self) -> Vec<&'static str> {
        let mut names = Vec::new();
        for place in &self.places {
            if !names.contains(&place.projection) {
                names.push(place.projection);
            }
        }
        names
    }
}

fn means(gates: &[&Vec<f64>]) -> Vec<f64> {
    let heads = gates.first().map_or(0, |gate| gate.len());
    (0..heads).map(|head| gates.iter().map(|gate| gate[head]).sum::<f64>() / gates.len() as f64).collect()
}

/// The numbers of one place; `entropy` is in nats.
fn numbers(gates: &[&Vec<f64>], entropy: f64) -> Numbers {
    let overall = means(gates);
    // With one head there is no entropy to divide by.
    let most = (overall.len() as f64).ln().max(f64::MIN_POSITIVE);
    let divergence = |gate: &[f64]| -> f64 {
        gate.iter().zip(&overall).filter(|(g, _)| **g > 0.0).map(|(g, o)| g * (g / o).log2()).sum()
    };
    let uneven: f64 = overall.iter().filter(|&&p| p > 0.0).map(|&p| -p * p.ln()).sum();
    Numbers {
        entropy: entropy / most,
        balance: uneven / most,
        largest: overall.iter().copied().fold(0.0, f64::max),
        mutual_information_bits: gates.iter().map(|gate| divergence(gate)).sum::<f64>() / gates.len() as f64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hydra_runtime::evaluate::GateMean;
    use hydra_runtime::projection::Projection;

    #[test]
    fn categories_count_alike_whatever_their_size() {
        let case = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/hydra");
        let adapter = Adapter::open(case.join("adapter")).unwrap();
        let watched = |tokens: usize, gate: [f64; 2], entropy: f64| {
            let mean = GateMean { layer: 0, projection: Projection::Q, lora_heads: gate.to_vec(), entropy };
            Watched { records: 1, tokens, means: vec![mean] }
        };
        let few = ("few".to_string(), watched(1, [1.0, 0.0], 0.0));
        let many = ("many".to_string(), watched(99, [0.5, 0.5], 2f64.ln()));
        let gates = Gates::new("a", &adapter, &BTreeMap::from([few, many]));
        assert!((gates.mean.entropy - 0.5).abs() < 1e-12 && (gates.mean.largest - 0.75).abs() < 1e-12);
        assert!(gates.mean.entropy <= gates.mean.balance);
    }

    #[test]
    fn a_head_each_says_all_and_alike_says_nothing() {
        let (a, b) = (vec![1.0, 0.0], vec![0.0, 1.0]);
        let each = numbers(&[&a, &b], 0.0);
        assert_eq!(each, Numbers { entropy: 0.0, balance: 1.0, largest: 0.5, mutual_information_bits: 1.0 });
        let half = vec![0.5, 0.5];
        let alike = numbers(&[&half, &half], 2f64.ln());
        assert_eq!(alike, Numbers { entropy: 1.0, balance: 1.0, largest: 0.5, mutual_information_bits: 0.0 });
        let collapsed = numbers(&[&a, &a], 0.0);
        assert_eq!((collapsed.balance, collapsed.largest, collapsed.mutual_information_bits), (0.0, 1.0, 0.0));
        // ¾ and ¼ against ½: 1 − H(¼) bits.
        let (c, d) = (vec![0.75, 0.25], vec![0.25, 0.75]);
        let want = 1.0 + 0.75 * 0.75f64.log2() + 0.25 * 0.25f64.log2();
        assert!((numbers(&[&c, &d], 0.5).mutual_information_bits - want).abs() < 1e-12);
    }
}
