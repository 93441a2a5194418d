//! What only HELM does, as in `in_context_learning_adapter.py` and `mmlu_scenario.py` of crfm-helm 0.5.16: it draws the
//! exemplars, so that their order is not the file's, and knows choices by their texts.

use std::collections::{BTreeMap, VecDeque};

/// The places of a prompt's exemplars, in their order; `answers` are the texts of all exemplars' right choices. Takes one of
/// each text in turn. Texts that more exemplars have come first; those of one number are shuffled by CPython's `random` with
/// seed 0.
pub fn exemplars(answers: &[&str], shots: usize) -> Vec<usize> {
    let mut wanted = shots.min(answers.len());
    let mut random = Mersenne::seeded();
    let mut by_text: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (place, text) in answers.iter().enumerate() {
        by_text.entry(*text).or_default().push(place);
    }
    let mut by_count: BTreeMap<usize, Vec<&str>> = BTreeMap::new();
    for (text, places) in &by_text {
        by_count.entry(places.len()).or_default().push(*text);
    }
    let mut turns = VecDeque::new();
    for (_, mut texts) in by_count.into_iter().rev() {
        random.shuffle(&mut texts);
        turns.extend(texts);
    }
    let mut taken = Vec::with_capacity(wanted);
    while let Some(text) = turns.pop_front().filter(|_| wanted > 0) {
        if let Some(places) = by_text.get_mut(text).filter(|places| !places.is_empty()) {
            taken.push(places.remove(random.below(places.len())));
            wanted -= 1;
        }
        turns.push_back(text);
    }
    taken
}

/// The first of the choices with the same text.
pub fn same(choices: &[String], choice: usize) -> usize {
    let text = |choice: usize| choices[choice].trim();
    (0..choice).find(|&other| text(other) == text(choice)).unwrap_or(choice)
}

const WORDS: usize = 624;

/// CPython's `random` after `random.seed(0)`: MT19937 (Matsumoto and Nishimura, 1998), initialised by the array [0].
struct Mersenne {
    state: [u32; WORDS],
    next: usize,
}

impl Mersenne {
    fn seeded() -> Self {
        let mixed = |word: u32| word ^ (word >> 30);
        let mut state = [19_650_218; WORDS];
        for i in 1..WORDS {
            state[i] = mixed(state[i - 1]).wrapping_mul(1_812_433_253).wrapping_add(i as u32);
        }
        let mut i = 1;
        let mut step = |times: usize, factor: u32, less: bool| {
            for _ in 0..times {
                let word = state[i] ^ mixed(state[i - 1]).wrapping_mul(factor);
                state[i] = if less { word.wrapping_sub(i as u32) } else { word };
                i += 1;
                if i == WORDS {
                    state[0] = state[WORDS - 1];
                    i = 1;
                }
            }
        };
        step(WORDS, 1_664_525, false);
        step(WORDS - 1, 1_566_083_941, true);
        state[0] = 1 << 31;
        Self { state, next: WORDS }
    }

    fn word(&mut self) -> u32 {
        if self.next == WORDS {
            for i in 0..WORDS {
                let word = (self.state[i] & (1 << 31)) | (self.state[(i + 1) % WORDS] & !(1 << 31));
                let odd = if word & 1 == 1 { 0x9908_B0DF } else { 0 };
                self.state[i] = self.state[(i + 397) % WORDS] ^ (word >> 1) ^ odd;
            }
            self.next = 0;
        }
        let mut word = self.state[self.next];
        self.next += 1;
        word ^= word >> 11;
        word ^= (word << 7) & 0x9D2C_5680;
        word ^= (word << 15) & 0xEFC6_0000;
        word ^ (word >> 18)
    }

    /// A number below `n`, which is at least 1: as many bits as `n` has, drawn again while they are not below it.
    fn below(&mut self, n: usize) -> usize {
        let bits = usize::BITS - n.leading_zeros();
        loop {
            let drawn = (self.word() >> (u32::BITS - bits)) as usize;
            if drawn < n {
                return drawn;
            }
        }
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            let other = self.below(i + 1);
            items.swap(i, other);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The places of the exemplars that are taken of those whose right answers have these texts.
    fn order(texts: &str, shots: usize) -> Vec<usize> {
        exemplars(&texts.split("").filter(|text| !text.is_empty()).collect::<Vec<_>>(), shots)
    }

    /// What `InContextLearningAdapter.sample_examples` of crfm-helm 0.5.16 returns.
    #[test]
    fn the_order_is_helms() {
        assert_eq!((order("abcde", 5), order("abcde", 2)), (vec![2, 1, 0, 4, 3], vec![2, 1]));
        assert_eq!((order("xyzxw", 5), order("xyzxw", 3)), (vec![0, 4, 2, 1, 3], vec![0, 4, 2]));
        assert_eq!(order("xxxyyz", 6), [1, 4, 5, 2, 3, 0]);
        assert_eq!(order("aaaaaaaabbbb", 12), [6, 11, 0, 9, 5, 10, 4, 8, 7, 2, 1, 3]);
        assert_eq!((order("", 5), order("ab", 0)), (vec![], vec![]));
    }

    #[test]
    fn choices_with_one_text_are_one() {
        let choices = ["a", "b ", "b", "a"].map(String::from);
        assert_eq!([0, 1, 2, 3].map(|choice| same(&choices, choice)), [0, 1, 1, 0]);
    }
}
