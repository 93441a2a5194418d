//! A merged model as a GGUF file.

use super::{MergeGate, Merged, Merging};
use crate::adapter::Adapter;
use crate::checkpoint::gguf::quantize::{encode_row, fitting, is_finite};
use crate::checkpoint::gguf::{self, describe};
use crate::checkpoint::{Checkpoint, TensorId};
use crate::{Error, Result};
use hydra_kernels::quant::Format;
use std::path::Path;

/// How a GGUF file is written.
#[derive(Clone, Copy, Debug)]
pub struct GgufOptions<'a> {
    /// The format of the matrices: F32, F16, BF16, Q8_0, Q5_0, Q4_0 or Q4_K. A matrix whose rows aren't whole blocks of Q4_K is
    /// written in Q5_0, and one whose rows aren't whole blocks of 32 in F16. Norms and biases are F32.
    pub format: Format,
    /// `general.description`, if there is something to be said.
    pub description: Option<&'a str>,
}

/// Writes the model with the adapter merged into it as one GGUF file at `path`. Its metadata are those of the GGUF that the model
/// came from; those of a Hugging Face model are made of its configuration and tokenizer. A matrix that the adapter doesn't change
/// and that is in the wanted format already is copied as it is. Of an adapter with a router it writes the approximation that `gate`
/// says.
///
/// # Errors
/// If `gate` doesn't fit the adapter, the adapter doesn't fit the model, GGUF can't express the model's configuration or tokenizer,
/// `options.format` is none of those above, or a value isn't finite, in the adapter or as it is written.
pub fn write_gguf(
    checkpoint: &Checkpoint,
    adapter: &Adapter,
    gate: MergeGate,
    path: &Path,
    options: GgufOptions<'_>,
) -> Result<Merged> {
    let merging = Merging::new(checkpoint, adapter, gate)?;
    if !gguf::quantize::WRITTEN.contains(&options.format) {
        let names = gguf::quantize::WRITTEN.map(Format::name).join(", ");
        return Err(Error::Invalid(format!("format {}: expected one of {names}", options.format.name())));
    }
    let config = checkpoint.config();
    let mut header = describe::model(checkpoint, options.format)?;
    if let Some(description) = options.description {
        header.string("general.description", description);
    }
    let factors = describe::rope_factors(config);
    let mut tensors = Vec::new();
    if let Some((name, values)) = &factors {
        header.tensor(name.clone(), &[values.len()], Format::F32);
    }
    for id in TensorId::all(config) {
        let (rows, cols) = id.dims(config);
        let format = if rows.is_some() { fitting(options.format, cols) } else { Format::F32 };
        let shape: Vec<usize> = rows.into_iter().chain([cols]).collect();
        header.tensor(gguf::name(id), &shape, format);
        tensors.push((id, format));
    }
    header.write(path, |i, bytes| match (&factors, i) {
        (Some((_, values)), 0) => {
            encode_row(Format::F32, values, bytes);
            Ok(())
        }
        (factors, i) => {
            let (id, format) = tensors[i - usize::from(factors.is_some())];
            tensor(&merging, id, format, bytes)
        }
    })?;
    let share = |&(id, format): &(TensorId, Format)| {
        let (rows, cols) = id.dims(config);
        (format, rows.unwrap_or(1) as u64 * format.row_bytes(cols).unwrap_or(0) as u64)
    };
    Ok(Merged { formats: super::formats(tensors.iter().map(share)), shards: 1, bytes: header.tensor_bytes() })
}

/// Appends a tensor's bytes.
fn tensor(merging: &Merging<'_>, id: TensorId, format: Format, bytes: &mut Vec<u8>) -> Result<()> {
    let (checkpoint, rows) = (merging.checkpoint, merging.row_count(id));
    let unchanged = merging.pair(id).is_none() && checkpoint.gguf().is_some();
    if unchanged && checkpoint.format(id) == format {
        bytes.extend_from_slice(checkpoint.raw(id));
        return Ok(());
    }
    let (mut finite, order) = (true, gguf::row_order(checkpoint.config(), id));
    let mut put = |row: &[f32]| {
        finite &= is_finite(format, row);
        encode_row(format, row, bytes);
    };
    if id.dims(checkpoint.config()).0.is_some() {
        merging.rows(id, gguf::stored_order(order, rows), &mut put);
    } else {
        let values = checkpoint.vector(id);
        put(&gguf::stored_order(order, values.len()).into_iter().map(|logical| values[logical]).collect::<Vec<_>>());
    }
    if finite {
        Ok(())
    } else {
        Err(Error::Invalid(format!("{} would hold values that aren't finite in {}", gguf::name(id), format.name())))
    }
}
