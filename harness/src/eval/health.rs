//! Whether a router does anything, in a few numbers: how sure it is, which heads it uses, how far training has moved it, and
//! what the loss would be without it.

use super::loss::{self, EvalLoss};
use super::router::{self, Sample, Watched};
use crate::data::encode::Encoded;
use crate::interrupt;
use crate::ranks::Ranks;
use crate::report::{Router, Routing};
use anyhow::Result;
use hydra_runtime::Error;
use hydra_runtime::adapter::{Adapter, GateKind};
use hydra_runtime::backend::Backend;
use hydra_runtime::batch::Sequence;
use hydra_runtime::merge::MergeGate;
use hydra_runtime::model::Model;
use serde::Serialize;
use std::collections::BTreeMap;

/// Records for a run's report, if they are short, and tokens. More would take longer than a short run.
const REPORTED: usize = 200;
const REPORTED_TOKENS: usize = 16_384;
/// Seed of their choice: one for all runs, so that routers are observed on the same records.
const REPORTED_SEED: u64 = 0;

/// A head whose mean weight is below this in every layer and projection is not used.
const UNUSED: f64 = 0.01;
/// A router is inert if it changes the loss by less than this share of it ..
const NO_GAIN: f64 = 1e-3;
/// .. and its entropy is at least this share of ln N.
const UNDECIDED: f64 = 0.999;

/// A router on some records.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Health {
    /// Mean entropy of a token's weights as a share of ln N: 1 where all heads weigh the same, 0 where each token has one.
    pub entropy: f64,
    /// Mean weight of each head over tokens, layers and projections.
    pub shares: Vec<f64>,
    /// Heads that are not used.
    pub unused: Vec<usize>,
    /// How far training has moved the routers' weights: ‖R − R₀‖ / ‖R₀‖ over all of them; `None` if they started at zero.
    pub moved: Option<f64>,
    /// The loss on the records, in nats per token.
    pub loss: f64,
    /// The same with the mean of the heads for every token.
    pub uniform_loss: f64,
}

impl Health {
    /// Measures `adapter`, which training has made of `start`; `watched` are its mean gates on `sequences`.
    pub fn measure<B: Backend>(
        model: &Model<B>,
        [adapter, start]: [&Adapter; 2],
        watched: &BTreeMap<String, Watched>,
        sequences: &[Sequence],
    ) -> Result<Self> {
        let n = adapter.config.lora_heads;
        let tokens: usize = watched.values().map(|watched| watched.tokens).sum();
        let (mut entropy, mut shares, mut places) = (0.0, vec![0.0; n], BTreeMap::new());
        for watched in watched.values() {
            let weight = watched.tokens as f64 / tokens.max(1) as f64;
            for mean in &watched.means {
                let share = weight / watched.means.len() as f64;
                entropy += share * mean.entropy;
                let place = places.entry((mean.layer, mean.projection.name())).or_insert_with(|| vec![0.0; n]);
                for (head, gate) in mean.lora_heads.iter().enumerate() {
                    shares[head] += share * gate;
                    place[head] += weight * gate;
                }
            }
        }
        let unused = (0..n).filter(|&head| places.values().all(|place| place[head] < UNUSED)).collect();
        let (uniform, _) = adapter.with_fixed_gate(MergeGate::Uniform)?;
        let uniform_sequences: Vec<_> = sequences.iter().map(|s| Sequence { lora_head: None, ..s.clone() }).collect();
        let loss = |adapter, sequences: &[Sequence]| -> Result<f64> {
            Ok(EvalLoss::of(
                &loss::losses(model, Some(adapter), sequences, &Ranks::alone(), |_| {})?,
                &vec![None; sequences.len()],
            )
            .all
            .loss)
        };
        Ok(Self {
            // One head has no entropy, and nothing to decide.
            entropy: if n > 1 { entropy / (n as f64).ln() } else { 0.0 },
            shares,
            unused,
            moved: moved(adapter, start),
            loss: loss(adapter, sequences)?,
            uniform_loss: loss(&uniform, &uniform_sequences)?,
        })
    }

    /// Whether the router might as well not be there.
    pub fn inert(&self) -> bool {
        self.entropy >= UNDECIDED && (self.uniform_loss - self.loss).abs() < NO_GAIN * self.loss
    }

    /// Names and values.
    pub fn rows(&self) -> Vec<(String, String)> {
        let percent = |share: &f64| format!("{:.1} %", 100.0 * share);
        let shares = self.shares.iter().map(percent).collect::<Vec<_>>().join(", ");
        let unused = match self.unused.as_slice() {
            [] => "none".to_string(),
            heads => heads.iter().map(usize::to_string).collect::<Vec<_>>().join(", "),
        };
        let moved = self.moved.map_or("from zero".to_string(), |moved| format!("{} of its start", percent(&moved)));
        let Self { entropy, loss, uniform_loss, .. } = self;
        [
            ("entropy", format!("{} of ln N; 100 % where all heads weigh the same", percent(entropy))),
            ("share of each head", shares),
            ("heads never used", unused),
            ("moved", moved),
            ("loss with the uniform gate", format!("{uniform_loss:.4}, {:+.4}", uniform_loss - loss)),
        ]
        .map(|(name, value)| (name.to_string(), value))
        .to_vec()
    }

    /// One line where the router is inert.
    pub fn warning(&self) -> Option<String> {
        self.inert().then(|| {
            format!(
                "the router is inert: its weights are nearly equal for every token, and without it the loss is {:.4} instead of {:.4}; \
                 more steps, a higher --router-lr or --head-init random may help",
                self.uniform_loss, self.loss
            )
        })
    }
}

/// What a run's report shows of the router of `adapter`, which `step` steps of training have made of `start`; `None` if it has no
/// router.
///
/// Observes it on some of `data`; `what` names these records, as in "held-out records".
pub fn for_report<B: Backend>(
    model: &Model<B>,
    [adapter, start]: [&Adapter; 2],
    (data, what): (&Encoded, &str),
    step: usize,
) -> Result<Option<Router>> {
    if adapter.config.gate != GateKind::Router {
        return Ok(None);
    }
    let tokens: usize = data.sequences.iter().map(|sequence| sequence.tokens.len()).sum();
    let records = (REPORTED_TOKENS * data.sequences.len() / tokens.max(1)).clamp(1, REPORTED);
    let sample = Sample::spread(data, records, REPORTED_SEED);
    let watched = router::watch(model, adapter, &sample)?;
    if !router::finite(&watched) {
        return Err(Error::NotFinite { what: "router's weight", value: f64::NAN, step: step as u64 }.into());
    }
    interrupt::check()?;
    let health = Health::measure(model, [adapter, start], &watched, &sample.sequences())?;
    let (layers, heads, targets) = (model.config().layers, adapter.config.lora_heads, adapter.config.targets.len());
    let mut routing = Routing::new();
    for (category, watched) in watched {
        let mut weights = vec![vec![0.0; heads]; layers];
        for mean in watched.means {
            for (sum, weight) in weights[mean.layer].iter_mut().zip(&mean.lora_heads) {
                *sum += weight / targets as f64;
            }
        }
        routing.insert(category, weights);
    }
    Ok(Some(Router { routing, caption: sample.describe(what), health: health.rows(), warning: health.warning() }))
}

/// ‖R − R₀‖ / ‖R₀‖ over all routers.
fn moved(adapter: &Adapter, start: &Adapter) -> Option<f64> {
    let (mut way, mut length) = (0.0, 0.0);
    for (pair, start) in adapter.layers.iter().flatten().flatten().zip(start.layers.iter().flatten().flatten()) {
        let rows = adapter.config.lora_heads * pair.d_in;
        let routers = |pair: &[f32]| pair[pair.len() - rows..].to_vec();
        for (r, r0) in routers(&pair.a).into_iter().zip(routers(&start.a)) {
            way += f64::from(r - r0).powi(2);
            length += f64::from(r0).powi(2);
        }
    }
    (length > 0.0).then(|| (way / length).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;
    use hydra_runtime::backend::cpu::{Cpu, CpuOptions};
    use hydra_runtime::checkpoint::Checkpoint;
    use hydra_runtime::evaluate::GateMean;
    use hydra_runtime::projection::Projection;

    fn watched(tokens: usize, gates: &[[f64; 2]]) -> Watched {
        let mean = |(layer, gates): (usize, &[f64; 2])| GateMean {
            layer,
            projection: Projection::Gate,
            lora_heads: gates.to_vec(),
            entropy: gates.iter().map(|g| if *g > 0.0 { -g * g.ln() } else { 0.0 }).sum(),
        };
        Watched { records: 1, tokens, means: gates.iter().enumerate().map(mean).collect() }
    }

    #[test]
    fn numbers_of_a_router() {
        let case = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/hydra");
        let checkpoint = Checkpoint::open(case.join("model")).unwrap();
        let model = Model::load(Cpu::new(CpuOptions::default()).unwrap(), &checkpoint).unwrap();
        let adapter = Adapter::load(case.join("adapter"), checkpoint.config()).unwrap();
        let sequences = [Sequence::answer(&[3, 4, 5], &[6, 7, 8, 9])];
        let measure = |watched: &[(&str, Watched)], start: &Adapter| {
            let watched = watched.iter().map(|(name, w)| {
                let means = w.means.clone();
                (name.to_string(), Watched { records: w.records, tokens: w.tokens, means })
            });
            Health::measure(&model, [&adapter, start], &watched.collect(), &sequences).unwrap()
        };
        let mut start = adapter.clone();
        start.layers.iter_mut().flatten().flatten().for_each(|pair| pair.a.iter_mut().for_each(|x| *x /= 2.0));
        let health = measure(&[("a", watched(30, &[[1.0, 0.0]; 2])), ("b", watched(10, &[[0.5, 0.5]; 2]))], &start);
        assert!((health.entropy - 0.25).abs() < 1e-9, "a quarter of the tokens are undecided");
        assert!((health.shares[0] - 0.875).abs() < 1e-9 && health.unused.is_empty());
        assert!((health.moved.unwrap() - 1.0).abs() < 1e-6, "twice the start");
        assert!(health.loss != health.uniform_loss && !health.inert() && health.warning().is_none());
        let one = measure(&[("a", watched(30, &[[1.0, 0.0], [0.995, 0.005]]))], &start);
        assert_eq!(one.unused, [1]);
        let even =
            Health { uniform_loss: health.loss + 1e-6, ..measure(&[("a", watched(9, &[[0.5, 0.5]; 2]))], &start) };
        assert!(even.inert() && even.warning().unwrap().contains("the router is inert"));
        // A router that decides is not inert, though it gains nothing; nor is one that gains.
        assert!(!Health { entropy: 0.9, ..even.clone() }.inert());
        assert!(!Health { uniform_loss: even.loss + 0.1, ..even }.inert());
        let mut zero = adapter.clone();
        zero.layers.iter_mut().flatten().flatten().for_each(|pair| pair.a.fill(0.0));
        assert_eq!(measure(&[("a", watched(9, &[[0.5, 0.5]; 2]))], &zero).moved, None);
    }
}
