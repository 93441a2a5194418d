//! Pairs of different ranks and scales as one adapter, which has one of each: the largest rank, and its alpha.
//!
//! A pair of a smaller rank gets rows of zeros in A and columns of zeros in B, a layer without a pair gets one of zeros, and
//! where the scale is another, B is multiplied by its ratio. The function is the same. What was padded stays zero in training:
//! each gradient has the other matrix's zeros as a factor.

use super::modules::Placed;
use super::{Adapter, AdapterConfig, AdapterPair, room, unfit};
use crate::Result;
use crate::projection::{ByProjection, Projection};
use hydra_kernels::shape::HydraShape;
use std::collections::BTreeMap;

/// Rank and alpha of one pair.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Own {
    pub rank: usize,
    pub alpha: f32,
}

impl AdapterConfig {
    /// With the projections, the rank and the alpha that hold for all pairs together.
    pub(super) fn of_all(mut self, placed: &Placed) -> Self {
        let owns = || placed.iter().flatten().flatten();
        self.targets = Projection::ALL.into_iter().filter(|&p| placed.iter().any(|pairs| pairs[p].is_some())).collect();
        self.rank = owns().map(|own| own.rank).max().unwrap_or(self.rank);
        let scaled = owns().filter(|own| own.alpha != 0.0).max_by_key(|own| own.rank);
        self.alpha = scaled.or_else(|| owns().next()).map_or(self.alpha, |own| own.alpha);
        self
    }

    /// The configuration of one pair alone.
    pub(super) fn of_one(&self, Own { rank, alpha }: Own) -> Self {
        Self { rank, alpha, ..self.clone() }
    }
}

impl Adapter {
    /// The adapter of pairs that are where `placed` says, each with its own rank and alpha.
    pub(super) fn of_pairs(
        config: AdapterConfig,
        placed: &Placed,
        mut layers: Vec<ByProjection<Option<AdapterPair>>>,
    ) -> Result<Self> {
        for projection in Projection::ALL {
            let Some(first) = layers.iter().find_map(|pairs| pairs[projection].as_ref()) else { continue };
            let shape = config.shape_of(first.d_in, first.d_out);
            for (layer, (pairs, owns)) in layers.iter_mut().zip(placed).enumerate() {
                pairs[projection] = Some(match pairs[projection].take().zip(owns[projection]) {
                    // Of a file alone: with a model, sizes are the model's.
                    Some((pair, _)) if pair.d_in == 0 || pair.d_out == 0 => return Err(unfit(layer, projection)),
                    Some((pair, own)) => pair.padded(&config, own)?,
                    None => zeros(&shape)?,
                });
            }
        }
        let adapter = Self { config, layers };
        // A ratio of scales may be beyond all numbers.
        adapter.check_finite()?;
        Ok(adapter)
    }

    /// How many of the pairs have which rank, without the zeros that fill them up; 0 where there is nothing. An adapter that
    /// was read from files with several ranks ([`Adapter::load`]) says here what they had.
    ///
    /// # Panics
    /// If a pair's sizes aren't those that its configuration says: [`Adapter::check`].
    pub fn ranks(&self) -> BTreeMap<usize, usize> {
        let mut ranks = BTreeMap::new();
        for (_, _, pair) in self.pairs() {
            let shape = self.config.shape_of(pair.d_in, pair.d_out);
            *ranks.entry(used(pair, &shape)).or_default() += 1;
        }
        ranks
    }
}

/// The rank up to the last row of A or column of B that isn't zero, of any head.
fn used(pair: &AdapterPair, shape: &HydraShape) -> usize {
    let rows = pair.a[..shape.a_rows() * pair.d_in].chunks_exact(pair.d_in).enumerate();
    let rows = rows.filter(|(_, row)| row.iter().any(|&x| x != 0.0)).map(|(row, _)| row % shape.rank + 1);
    let columns = pair.b.iter().enumerate().filter(|&(_, &x)| x != 0.0).map(|(at, _)| at % shape.rank + 1);
    rows.chain(columns).max().unwrap_or(0)
}

fn zeros(shape: &HydraShape) -> Result<AdapterPair> {
    let (a_len, b_len) = (shape.stacked_rows() * shape.d_in, shape.d_out * shape.mixed_width());
    let (mut a, mut b) = (room(a_len)?, room(b_len)?);
    a.resize(a_len, 0.0);
    b.resize(b_len, 0.0);
    Ok(AdapterPair { d_in: shape.d_in, d_out: shape.d_out, a, b })
}

impl AdapterPair {
    /// The pair at the rank and scale of `config`.
    fn padded(self, config: &AdapterConfig, own: Own) -> Result<Self> {
        let alone = config.of_one(own);
        let (wanted, all) = (alone.scale(), config.scale());
        let (ratio, more) = (if wanted == all { 1.0 } else { wanted / all }, config.rank - own.rank);
        if more == 0 && ratio == 1.0 {
            return Ok(self);
        }
        let Self { d_in, d_out, a, b } = self;
        let shape = config.shape_of(d_in, d_out);
        let (mut wide_a, mut wide_b) = (room(shape.stacked_rows() * d_in)?, room(d_out * shape.mixed_width())?);
        let (of_a, of_router) = a.split_at(alone.shape_of(d_in, d_out).a_rows() * d_in);
        for head in of_a.chunks_exact(own.rank * d_in) {
            wide_a.extend_from_slice(head);
            wide_a.resize(wide_a.len() + more * d_in, 0.0);
        }
        wide_a.extend_from_slice(of_router);
        for of_head in b.chunks_exact(own.rank) {
            wide_b.extend(of_head.iter().map(|b| ratio * b));
            wide_b.resize(wide_b.len() + more, 0.0);
        }
        Ok(Self { d_in, d_out, a: wide_a, b: wide_b })
    }
}
