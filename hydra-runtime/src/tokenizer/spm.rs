//! SentencePiece BPE from a GGUF vocabulary (`tokenizer.ggml.model = llama`).
//!
//! SentencePiece joins, again and again, the two neighbours whose joined piece has the highest score. As merges that is:
//! for every piece, each way of cutting it into two pieces of the vocabulary, ordered by the piece's score. Spaces are
//! "▁"; characters that no piece has become their UTF-8 bytes, `<0xE2>`.

use super::refused;
use crate::{Error, Result};
use std::collections::HashMap;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::{Prepend, Replace, Sequence as Normalizers};
use tokenizers::{DecoderWrapper, NormalizerWrapper, Tokenizer};

const SPACE: &str = "▁";
/// SentencePiece's pieces are some tens of bytes; finding the cuts of a piece takes the square of its length.
const MAX_PIECE: usize = 1024;

/// Builds the pipeline. `joinable` says which tokens may come out of a merge: normal pieces.
pub(crate) fn build(
    tokens: &[&str],
    scores: &[f32],
    joinable: impl Fn(usize) -> bool,
    unknown: Option<u32>,
    add_space_prefix: bool,
) -> Result<Tokenizer> {
    let ids: HashMap<&str, usize> = tokens.iter().enumerate().map(|(id, &token)| (token, id)).collect();
    let mut merges = Vec::new();
    for (id, &piece) in tokens.iter().enumerate().filter(|&(id, _)| joinable(id)) {
        if piece.len() > MAX_PIECE {
            return Err(Error::Tokenizer(format!("token {id} has {} bytes, wanted at most {MAX_PIECE}", piece.len())));
        }
        if !scores[id].is_finite() {
            return Err(Error::Tokenizer(format!("token {id} has score {}", scores[id])));
        }
        let cuts = piece.char_indices().skip(1).map(|(at, _)| piece.split_at(at));
        let known = cuts.filter_map(|(left, right)| Some((*ids.get(left)?, *ids.get(right)?)));
        merges.extend(known.filter(|&(l, r)| joinable(l) && joinable(r)).map(|(left, right)| (id, left, right)));
    }
    merges.sort_by(|a, b| scores[b.0].total_cmp(&scores[a.0]).then(a.cmp(b)));
    let merges = merges.into_iter().map(|(_, left, right)| (tokens[left].to_string(), tokens[right].to_string()));
    let vocab = tokens.iter().zip(0u32..).map(|(token, id)| (token.to_string(), id)).collect();
    let mut model = BPE::builder().vocab_and_merges::<tokenizers::models::bpe::Vocab>(vocab, merges.collect());
    if let Some(token) = unknown.and_then(|id| tokens.get(id as usize)) {
        model = model.unk_token(token.to_string());
    }
    let model = model.byte_fallback(true).fuse_unk(true).build().map_err(refused)?;
    let mut tokenizer = Tokenizer::new(model);
    let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
    let mut decoders: Vec<DecoderWrapper> =
        vec![Replace::new(SPACE, " ").map_err(refused)?.into(), ByteFallback::new().into(), Fuse::new().into()];
    if add_space_prefix {
        normalizers.push(Prepend::new(SPACE.into()).into());
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    normalizers.push(Replace::new(" ", SPACE).map_err(refused)?.into());
    tokenizer.with_normalizer(Some(Normalizers::new(normalizers)));
    tokenizer.with_decoder(Some(Decoders::new(decoders)));
    Ok(tokenizer)
}
