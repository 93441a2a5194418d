//! Tokens in the colours of their routers' strongest heads.

use super::command::Place;
use crate::serve::{Delta, Piece};
use hydra_runtime::serve::TokenGates;

/// ANSI's colours of heads, in the order of the pages' ones: blue, yellow, green, magenta, cyan, red, grey, white.
const COLOURS: [u8; 8] = [34, 33, 32, 35, 36, 31, 90, 37];

/// Colours an answer as it comes.
pub struct Colouring {
    place: Place,
    /// Tokens of each head.
    counts: Vec<usize>,
    /// The head of the token whose text comes next.
    head: Option<usize>,
    /// Characters so far.
    shown: usize,
}

impl Colouring {
    /// By the weights of a place.
    pub fn new(place: Place) -> Self {
        Self { place, counts: Vec::new(), head: None, shown: 0 }
    }

    /// A piece of an answer with its colours.
    pub fn paint(&mut self, delta: &Delta) -> String {
        let chars: Vec<char> = delta.text.chars().collect();
        let end = self.shown + chars.len();
        let mut text = String::new();
        for piece in &delta.pieces {
            let at = piece.offset.clamp(self.shown, end);
            text += &self.in_colour(&chars, at, end);
            self.head = self.count(piece);
        }
        text += &self.in_colour(&chars, end, end);
        text
    }

    /// The text up to a place, in the colour of the token that it belongs to.
    fn in_colour(&mut self, chars: &[char], to: usize, end: usize) -> String {
        let start = end - chars.len();
        let part: String = chars[self.shown - start..to - start].iter().collect();
        self.shown = to;
        match self.head {
            Some(head) if !part.is_empty() => format!("\x1b[{}m{part}\x1b[0m", COLOURS[head % COLOURS.len()]),
            _ => part,
        }
    }

    fn count(&mut self, piece: &Piece) -> Option<usize> {
        let head = strongest(piece.gates.as_ref()?, self.place)?;
        self.counts.resize(self.counts.len().max(head + 1), 0);
        self.counts[head] += 1;
        Some(head)
    }

    /// How many tokens each head was the strongest for: "head 0: 7 tokens, head 1: 3 tokens".
    pub fn legend(&self) -> String {
        if self.counts.is_empty() {
            return "no router here: the adapter has one head, there is none, or not at that place".into();
        }
        let entry = |(head, count): (usize, &usize)| {
            format!("\x1b[{}mhead {head}\x1b[0m: {count} tokens", COLOURS[head % COLOURS.len()])
        };
        self.counts.iter().enumerate().map(entry).collect::<Vec<_>>().join(", ")
    }
}

/// The head with the largest mean weight over a place; `None` where there is no choice.
fn strongest(gates: &TokenGates, place: Place) -> Option<usize> {
    let heads = gates.lora_heads;
    if heads < 2 {
        return None;
    }
    let chosen = |(layer, projection): &(usize, _)| {
        place.layer.is_none_or(|wanted| wanted == *layer) && place.projection.is_none_or(|wanted| wanted == *projection)
    };
    let rows = gates.slots.iter().zip(gates.gates.chunks(heads)).filter(|(slot, _)| chosen(slot));
    let mut sums = vec![0.0; heads];
    let mut count = 0;
    for (_, row) in rows {
        sums.iter_mut().zip(row).for_each(|(sum, gate)| *sum += gate);
        count += 1;
    }
    // Of equal ones the first.
    (0..heads).rev().max_by(|&a, &b| sums[a].total_cmp(&sums[b])).filter(|_| count > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hydra_runtime::projection::Projection::{Down, Up};

    #[test]
    fn each_token_has_its_heads_colour() {
        let gates = |first: [f32; 4]| {
            Some(TokenGates { slots: vec![(0, Up), (1, Down)], lora_heads: 2, gates: first.to_vec() })
        };
        let piece = |offset, gates| Piece { token: 0, offset, logprob: None, gates };
        let mut all = Colouring::new(Place::default());
        let pieces = vec![piece(0, gates([0.9, 0.1, 0.6, 0.4])), piece(2, gates([0.2, 0.8, 0.5, 0.5]))];
        let text = all.paint(&Delta { text: "abc".into(), pieces, finish: None });
        assert_eq!(text, "\x1b[34mab\x1b[0m\x1b[33mc\x1b[0m");
        // What belongs to the last token keeps its colour.
        let more = Delta { text: "de".into(), pieces: vec![piece(4, None)], finish: None };
        assert_eq!(all.paint(&more), "\x1b[33md\x1b[0me");
        assert!(all.legend().contains("head 1\x1b[0m: 1 tokens"));
        let place = |layer, projection| Place { layer: Some(layer), projection };
        let token = gates([0.9, 0.1, 0.3, 0.7]).unwrap();
        assert_eq!(strongest(&token, place(0, None)), Some(0));
        assert_eq!(strongest(&token, place(1, Some(Down))), Some(1));
        assert_eq!(strongest(&token, place(1, Some(Up))), None);
    }
}
