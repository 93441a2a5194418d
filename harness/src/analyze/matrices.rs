//! The matrices of adapters: for each layer, projection and head an A (or one for all heads) and a B.

use anyhow::{Result, bail};
use hydra_runtime::adapter::{Adapter, GateKind, Method};
use hydra_runtime::projection::Projection;

/// A or B.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// From the projection's input to the rank.
    A,
    /// From the rank to the projection's output.
    B,
}

/// One matrix, with a row for each direction of the rank; a B is transposed.
pub struct Matrix {
    /// Index of its adapter.
    pub adapter: usize,
    /// Its layer.
    pub layer: usize,
    /// Its projection.
    pub projection: Projection,
    /// Its head; `None` for an A that all heads share.
    pub head: Option<usize>,
    /// Length of a row: d_in or d_out.
    pub width: usize,
    /// The entries, [rank, width].
    pub values: Vec<f32>,
}

/// All matrices of one kind.
pub fn all(adapters: &[Adapter], kind: Kind) -> Vec<Matrix> {
    let mut matrices = Vec::new();
    for (index, adapter) in adapters.iter().enumerate() {
        let (rank, heads) = (adapter.config.rank, adapter.config.lora_heads);
        let shared = adapter.config.method != Method::Split;
        for (layer, pairs) in adapter.layers.iter().enumerate() {
            for projection in Projection::ALL {
                let Some(pair) = &pairs[projection] else { continue };
                let mut push = |head, width, values| {
                    matrices.push(Matrix { adapter: index, layer, projection, head, width, values });
                };
                for head in 0..if kind == Kind::A && shared { 1 } else { heads } {
                    let rows = head * rank..(head + 1) * rank;
                    if kind == Kind::A {
                        let values = pair.a[rows.start * pair.d_in..rows.end * pair.d_in].to_vec();
                        push((!shared || heads == 1).then_some(head), pair.d_in, values);
                    } else {
                        let column = |column: usize| pair.b.chunks_exact(heads * rank).map(move |row| row[column]);
                        push(Some(head), pair.d_out, rows.flat_map(column).collect());
                    }
                }
            }
        }
    }
    matrices
}

/// Fails if the adapters are for models of different shapes.
pub fn check_alike(adapters: &[Adapter], names: &[String]) -> Result<()> {
    let (first, name) = (&adapters[0], &names[0]);
    for (other, other_name) in adapters.iter().zip(names).skip(1) {
        if other.layers.len() != first.layers.len() {
            let (a, b) = (first.layers.len(), other.layers.len());
            bail!("{name} has {a} layers and {other_name} {b}: they are not of one model");
        }
        for (mine, theirs) in first.layers.iter().flatten().zip(other.layers.iter().flatten()) {
            if let (Some(mine), Some(theirs)) = (mine, theirs)
                && (mine.d_in, mine.d_out) != (theirs.d_in, theirs.d_out)
            {
                let (a, b) = ((mine.d_in, mine.d_out), (theirs.d_in, theirs.d_out));
                bail!("{name} adapts a projection of {a:?} where {other_name} has {b:?}: they are not of one model");
            }
        }
    }
    Ok(())
}

/// A head's name: its label under the label gate, otherwise its number.
pub fn head_name(adapter: &Adapter, head: usize) -> String {
    match adapter.config.labels.get(head) {
        Some(label) if adapter.config.gate == GateKind::Label => label.clone(),
        _ => format!("head {head}"),
    }
}
