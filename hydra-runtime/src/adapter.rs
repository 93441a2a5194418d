//! A HydraLoRA adapter in memory: its configuration and, for each adapted projection of each layer,
//!
//! ```text
//! a [a_rows (+ lora_heads), d_in]     A (rank rows, or heads·rank with one A per head), then the router's rows if there is one
//! b [d_out, lora_heads·rank]          head e owns columns e·rank .. (e+1)·rank
//! ```
//! Files are in `adapter/file.rs`, their configuration in `adapter/config.rs`; llama.cpp's in `adapter/gguf.rs`.

mod config;
mod contents;
pub(crate) mod device;
mod file;
mod gguf;
mod kind;
mod modules;
mod pad;

pub use crate::backend::GateKind;
pub use config::AdapterConfig;
pub use contents::{Contents, StoredTensor};
pub use kind::{HeadInit, Method};

use crate::config::Config;
use crate::error::out_of_memory;
use crate::projection::{ByProjection, Projection};
use crate::{Error, Result};
use hydra_kernels::hydra::AdapterRef;
use hydra_kernels::random::SplitMix64;
use hydra_kernels::shape::HydraShape;

/// One projection's trainable matrices.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterPair {
    /// Columns of the projection's weight.
    pub d_in: usize,
    /// Rows of the projection's weight.
    pub d_out: usize,
    /// The stacked `[A; R]`, [a_rows (+ lora_heads with a router), d_in].
    pub a: Vec<f32>,
    /// [d_out, lora_heads * rank].
    pub b: Vec<f32>,
}

impl AdapterPair {
    /// The pair as the kernels take it, for a layer of a program of your own: see
    /// [`Cpu::layer_forward`](crate::backend::cpu::Cpu::layer_forward). `config` is the adapter's.
    pub fn adapter_ref<'a>(&'a self, config: &AdapterConfig) -> AdapterRef<'a> {
        AdapterRef {
            shape: config.shape_of(self.d_in, self.d_out),
            a: &self.a,
            b: &self.b,
            scale: config.scale(),
            gate: config.gate.with(config.routing()),
        }
    }
}

/// An adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// Kind, sizes, targets.
    pub config: AdapterConfig,
    /// For each layer, a pair for each target.
    pub layers: Vec<ByProjection<Option<AdapterPair>>>,
}

impl Adapter {
    /// A new adapter, which changes nothing yet: A and R uniform in ±1/√d_in (Kaiming with a = √5), B zero.
    ///
    /// Values come from SplitMix64, one stream for each layer and projection, so that they depend on the seed and the
    /// place alone: stream `p + 7·layer` starts at the `p + 7·layer`-th output of the stream that `seed` starts; the upper
    /// 24 bits u of each output give the value (2 (u + ½) / 2²⁴ − 1) / √d_in; A first, row by row, then R.
    ///
    /// With [`HeadInit::Random`] (Multi-Head Random Initialization of R-LoRA, arXiv 2502.15455) R is zero and B, row by row, goes
    /// on in the stream after A: values of standard deviation d_out^(-1/4) / 8, from which the mean of their heads is taken, so
    /// that under R's uniform gate the heads cancel (to rounding) and the new adapter still changes nothing. (R-LoRA itself
    /// doesn't centre, but takes the heads' mean out of the base weights.) A standard normal value is half the sum of twelve
    /// outputs in (-1, 1): the same bits on every machine, with tails that end at six.
    pub fn init(model: &Config, config: AdapterConfig, seed: u64) -> Result<Self> {
        config.check()?;
        let layers = fresh(&config, seed, model.layers, |_, projection| projection.dims(model))?;
        Ok(Self { config, layers })
    }

    /// What [`Adapter::init`] gave with `seed` for an adapter of these sizes.
    pub fn start(&self, seed: u64) -> Result<Self> {
        let size = |layer: usize, projection| {
            let pair = self.layers[layer][projection].as_ref();
            pair.map_or((0, 0), |pair| (pair.d_out, pair.d_in))
        };
        Ok(Self { config: self.config.clone(), layers: fresh(&self.config, seed, self.layers.len(), size)? })
    }

    /// One head alone, as a LoRA: its A (or the one that all share) and its B.
    pub fn head(&self, head: usize) -> Result<Self> {
        self.check()?;
        let AdapterConfig { rank, lora_heads, .. } = self.config;
        if head >= lora_heads {
            return Err(Error::WrongAdapter(format!("head {head} of an adapter of {lora_heads} heads")));
        }
        let mut alone = self.clone();
        alone.config =
            AdapterConfig { method: Method::Lora, lora_heads: 1, ..self.config.without_router(GateKind::One) };
        alone.config.labels.clear();
        alone.config.label_field = None;
        alone.config.head_dropout = 0.0;
        // Keys of the published implementation's, which older versions of PEFT refuse.
        for key in ["lora_nums", "blc_alpha", "blc_weight", "enable_lora", "merge_weights"] {
            alone.config.extra.remove(key);
        }
        for pair in alone.layers.iter_mut().flatten().flatten() {
            let first = if self.config.method == Method::Split { head * rank } else { 0 };
            pair.a = pair.a[first * pair.d_in..][..rank * pair.d_in].to_vec();
            pair.b =
                pair.b.chunks_exact(lora_heads * rank).flat_map(|row| &row[head * rank..][..rank]).copied().collect();
        }
        Ok(alone)
    }

    /// Number of trainable parameters, the router's among them.
    pub fn parameters(&self) -> u64 {
        self.pairs().map(|(_, _, pair)| (pair.a.len() + pair.b.len()) as u64).sum()
    }

    /// The pairs in order: layer, projection, pair.
    fn pairs(&self) -> impl Iterator<Item = (usize, Projection, &AdapterPair)> {
        self.layers.iter().enumerate().flat_map(|(layer, pairs)| {
            Projection::ALL.into_iter().filter_map(move |p| Some((layer, p, pairs[p].as_ref()?)))
        })
    }

    /// An error unless the adapter has exactly the pairs, of the sizes, that its configuration calls for on this model.
    pub fn fits(&self, model: &Config) -> Result<()> {
        self.check()?;
        let differs =
            |(_, projection, pair): &(_, Projection, &AdapterPair)| (pair.d_out, pair.d_in) != projection.dims(model);
        let Some((layer, projection, pair)) = self.pairs().find(differs) else {
            if self.layers.len() == model.layers {
                return Ok(());
            }
            let (got, want) = (self.layers.len(), model.layers);
            let some = if got < want { "; one for some of them says so in layers_to_transform" } else { "" };
            return Err(Error::WrongAdapter(format!("the adapter is for {got} layers, the model has {want}{some}")));
        };
        // These read the residual stream, and those write to it.
        let width = match projection {
            Projection::O | Projection::Down => pair.d_out,
            _ => pair.d_in,
        };
        if width != model.d_model {
            return Err(Error::WrongAdapter(format!(
                "the adapter is for width {width}, the model has {}",
                model.d_model
            )));
        }
        let (d_out, d_in) = projection.dims(model);
        let place = format!("layer {layer} {}", projection.name());
        let found = format!("[{}, {}]", pair.d_out, pair.d_in);
        Err(Error::WrongAdapter(format!("the adapter of {place} is for {found}, the model has [{d_out}, {d_in}]")))
    }

    /// An error if a value is infinite or not a number.
    pub(crate) fn check_finite(&self) -> Result<()> {
        let finite = |(_, _, pair): &(_, _, &AdapterPair)| pair.a.iter().chain(&pair.b).all(|x| x.is_finite());
        match self.pairs().find(|pair| !finite(pair)) {
            Some((layer, projection, _)) => {
                let place = format!("layer {layer} {}", projection.name());
                Err(Error::WrongAdapter(format!("the adapter of {place} has values that are not finite")))
            }
            None => Ok(()),
        }
    }

    /// An error unless the adapter has exactly the pairs that its configuration calls for, each of the sizes that it says.
    pub fn check(&self) -> Result<()> {
        self.config.check()?;
        let whole = |pair: &AdapterPair| {
            let shape = self.config.shape_of(pair.d_in, pair.d_out);
            let (a, b) = (shape.stacked_rows() * shape.d_in, shape.d_out * shape.mixed_width());
            pair.d_in > 0 && pair.d_out > 0 && (pair.a.len(), pair.b.len()) == (a, b)
        };
        for (layer, pairs) in self.layers.iter().enumerate() {
            for projection in Projection::ALL {
                let (pair, wanted) = (&pairs[projection], self.config.targets.contains(&projection));
                if pair.is_some() != wanted || pair.as_ref().is_some_and(|pair| !whole(pair)) {
                    return Err(unfit(layer, projection));
                }
            }
        }
        Ok(())
    }
}

fn unfit(layer: usize, projection: Projection) -> Error {
    let name = projection.name();
    Error::WrongAdapter(format!("the adapter of layer {layer} {name} doesn't fit its configuration and model"))
}

/// An empty vector with room for `len` values.
fn room(len: usize) -> Result<Vec<f32>> {
    let mut values = Vec::new();
    values.try_reserve_exact(len).map_err(|_| out_of_memory(len.saturating_mul(size_of::<f32>())))?;
    Ok(values)
}

/// New pairs for all layers; `size` gives d_out and d_in.
fn fresh(
    config: &AdapterConfig,
    seed: u64,
    layers: usize,
    size: impl Fn(usize, Projection) -> (usize, usize),
) -> Result<Vec<ByProjection<Option<AdapterPair>>>> {
    let mut seeds = SplitMix64::new(seed);
    let mut pair = |layer, projection| {
        // Projections that are not adapted have a stream, too.
        let stream = SplitMix64::new(seeds.next_u64());
        let adapted = config.targets.contains(&projection);
        adapted.then(|| fresh_pair(config, size(layer, projection), stream)).transpose()
    };
    (0..layers).map(|layer| ByProjection::try_from_fn(|projection| pair(layer, projection))).collect()
}

fn fresh_pair(config: &AdapterConfig, (d_out, d_in): (usize, usize), mut stream: SplitMix64) -> Result<AdapterPair> {
    let shape = config.shape_of(d_in, d_out);
    let bound = 1.0 / (d_in as f64).sqrt();
    let (a_len, b_len) = (shape.stacked_rows() * d_in, d_out * shape.mixed_width());
    let (mut a, mut b) = (room(a_len)?, room(b_len)?);
    // The router's rows are drawn like A's, or zero.
    let drawn = if config.head_init == HeadInit::Zero { a_len } else { shape.a_rows() * d_in };
    a.extend((0..drawn).map(|_| (symmetric(&mut stream) * bound) as f32));
    a.resize(a_len, 0.0);
    match config.head_init {
        HeadInit::Zero => b.resize(b_len, 0.0),
        HeadInit::Random => apart(&mut b, &shape, &mut stream),
    }
    Ok(AdapterPair { d_in, d_out, a, b })
}

/// Fills B with [`HeadInit::Random`]'s.
fn apart(b: &mut Vec<f32>, shape: &HydraShape, stream: &mut SplitMix64) {
    let deviation = (shape.d_out as f64).sqrt().sqrt().recip() / 8.0;
    let mut row = vec![0.0; shape.mixed_width()];
    for _ in 0..shape.d_out {
        row.fill_with(|| normal(stream) * deviation);
        for column in 0..shape.mixed_width() {
            let of_heads = row.iter().skip(column % shape.rank).step_by(shape.rank);
            b.push((row[column] - of_heads.sum::<f64>() / shape.lora_heads as f64) as f32);
        }
    }
}

impl AdapterConfig {
    /// The sizes of the adapter on one projection.
    pub fn shape(&self, model: &Config, projection: Projection) -> HydraShape {
        let (d_out, d_in) = projection.dims(model);
        self.shape_of(d_in, d_out)
    }

    /// Those of a layer's adapters.
    pub(crate) fn shapes(&self, model: &Config) -> Vec<HydraShape> {
        self.targets.iter().map(|&projection| self.shape(model, projection)).collect()
    }

    pub(crate) fn shape_of(&self, d_in: usize, d_out: usize) -> HydraShape {
        let (rank, lora_heads) = (self.rank, self.lora_heads);
        let (per_head_a, router) = (self.method == Method::Split, self.gate == GateKind::Router);
        HydraShape { d_in, d_out, rank, lora_heads, per_head_a, router }
    }

    /// Number of trainable parameters on a model, the router's among them; saturates.
    pub fn parameters(&self, model: &Config) -> u64 {
        let pair = |&projection: &Projection| {
            let shape = self.shape(model, projection);
            shape
                .stacked_rows()
                .saturating_mul(shape.d_in)
                .saturating_add(shape.d_out.saturating_mul(shape.mixed_width())) as u64
        };
        (model.layers as u64).saturating_mul(self.targets.iter().map(pair).fold(0, u64::saturating_add))
    }
}

/// The next output's upper 24 bits as a number in (-1, 1).
fn symmetric(random: &mut SplitMix64) -> f64 {
    let upper = (random.next_u64() >> 40) as f64;
    2.0 * (upper + 0.5) / (1u64 << 24) as f64 - 1.0
}

/// A number of mean 0 and deviation 1, nearly normal.
fn normal(random: &mut SplitMix64) -> f64 {
    (0..12).map(|_| symmetric(random)).sum::<f64>() / 2.0
}
