//! One choice of an answer as it grows: tokens become text, stop strings are looked for, and each token keeps its
//! log-probabilities and gates until its text may be shown.

use hydra_runtime::Result;
use hydra_runtime::generate::{Finish, StopStrings};
use hydra_runtime::serve::{TokenGates, TokenLogprob};
use hydra_runtime::tokenizer::TextStream;
use std::collections::VecDeque;

/// A token of an answer, or of a prompt that is repeated.
pub struct Piece {
    /// Its id.
    pub token: u32,
    /// Where its text begins in that of the choice, in characters.
    pub offset: usize,
    /// If it was asked for, and unless it is a prompt's first token.
    pub logprob: Option<TokenLogprob>,
    /// If they were asked for.
    pub gates: Option<TokenGates>,
}

/// What has come to an answer.
#[derive(Default)]
pub struct Delta {
    /// Its text.
    pub text: String,
    /// The tokens that begin in it.
    pub pieces: Vec<Piece>,
    /// Why it has ended.
    pub finish: Option<Finish>,
}

impl Delta {
    /// Whether there is nothing to show.
    pub fn is_empty(&self) -> bool {
        self.text.is_empty() && self.pieces.is_empty() && self.finish.is_none()
    }

    /// Puts what follows behind it.
    pub fn append(&mut self, next: Delta) {
        self.text += &next.text;
        self.pieces.extend(next.pieces);
        self.finish = next.finish.or(self.finish);
    }
}

/// A choice of an answer.
pub struct Answer {
    /// `None` once it has been finished.
    text: Option<TextStream>,
    stop: StopStrings,
    /// Tokens that end it. The engine ends it itself, unless it was to report the log-probability of such a token.
    ends: Vec<u32>,
    /// Characters decoded so far.
    decoded: usize,
    /// Characters shown so far.
    shown: usize,
    /// Tokens whose text has not been shown.
    held: VecDeque<Piece>,
    /// Tokens drawn so far, but for one that has ended it.
    pub tokens: usize,
    finished: bool,
}

impl Answer {
    /// An empty one, whose text `stream` decodes.
    pub fn new(stream: TextStream, stop: Vec<String>, ends: Vec<u32>) -> Result<Self> {
        Ok(Self {
            text: Some(stream),
            stop: StopStrings::new(stop)?,
            ends,
            decoded: 0,
            shown: 0,
            held: VecDeque::new(),
            tokens: 0,
            finished: false,
        })
    }

    /// Whether nothing follows any more.
    pub fn is_finished(&self) -> bool {
        self.finished
    }

    /// Begins with the prompt, in which no stop string is looked for; `logprobs` has an entry for each of its tokens, or none.
    pub fn echo(&mut self, prompt: &[u32], logprobs: Vec<Option<TokenLogprob>>) -> Result<Delta> {
        let mut delta = Delta::default();
        let mut logprobs = logprobs.into_iter();
        for &token in prompt {
            let piece = Piece { token, offset: self.decoded, logprob: logprobs.next().flatten(), gates: None };
            delta.text += &self.decode(token)?;
            delta.pieces.push(piece);
        }
        self.shown = self.decoded;
        Ok(delta)
    }

    /// Takes a token that was drawn.
    pub fn push(&mut self, token: u32, logprob: Option<TokenLogprob>, gates: Option<TokenGates>) -> Result<Delta> {
        if self.finished {
            return Ok(Delta::default());
        }
        self.held.push_back(Piece { token, offset: self.decoded, logprob, gates });
        if self.ends.contains(&token) {
            return self.end(Finish::EndOfText);
        }
        self.tokens += 1;
        let text = self.decode(token)?;
        let ready = self.stop.push(&text);
        match self.stop.finished() {
            true => Ok(self.stopped(ready)),
            false => Ok(self.show(ready, None)),
        }
    }

    /// Ends it: the model has, or there is no room for more.
    pub fn end(&mut self, finish: Finish) -> Result<Delta> {
        if self.finished {
            return Ok(Delta::default());
        }
        let rest = self.text.take().map_or(Ok(String::new()), TextStream::finish)?;
        self.decoded += rest.chars().count();
        let mut ready = self.stop.push(&rest);
        if self.stop.finished() {
            return Ok(self.stopped(ready));
        }
        ready += &self.stop.finish();
        Ok(self.show(ready, Some(finish)))
    }

    fn decode(&mut self, token: u32) -> Result<String> {
        let text = self.text.as_mut().map_or(Ok(String::new()), |text| text.push(token))?;
        self.decoded += text.chars().count();
        Ok(text)
    }

    /// Ends it at a stop string: tokens that begin in or after it are not part of the answer.
    fn stopped(&mut self, ready: String) -> Delta {
        let delta = self.show(ready, None);
        self.held.clear();
        self.finished = true;
        Delta { finish: Some(Finish::Stop), ..delta }
    }

    /// Shows text, and the tokens that begin in it; at the end all tokens.
    fn show(&mut self, text: String, finish: Option<Finish>) -> Delta {
        self.shown += text.chars().count();
        self.finished = finish.is_some();
        let count = match finish {
            Some(_) => self.held.len(),
            None => self.held.iter().take_while(|piece| piece.offset < self.shown).count(),
        };
        Delta { text, pieces: self.held.drain(..count).collect(), finish }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hydra_runtime::checkpoint::Checkpoint;
    use hydra_runtime::tokenizer::Tokenizer;
    use std::path::Path;

    fn tokenizer() -> Tokenizer {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/model");
        Checkpoint::open(model).unwrap().tokenizer().unwrap()
    }

    /// Every delta of an answer that draws the tokens of `text`, then the model's end.
    fn deltas(text: &str, stop: &[&str]) -> Vec<Delta> {
        let tokenizer = tokenizer();
        let stop = stop.iter().map(|stop| stop.to_string()).collect();
        let mut answer = Answer::new(tokenizer.stream(), stop, Vec::new()).unwrap();
        let ids = tokenizer.encode(text).unwrap();
        let mut deltas: Vec<Delta> = ids.iter().map(|&id| answer.push(id, None, None).unwrap()).collect();
        deltas.push(answer.end(Finish::EndOfText).unwrap());
        assert!(answer.is_finished());
        deltas
    }

    fn whole(deltas: Vec<Delta>) -> Delta {
        let mut whole = Delta::default();
        deltas.into_iter().for_each(|delta| whole.append(delta));
        whole
    }

    #[test]
    fn text_comes_whole_and_tokens_know_their_place() {
        let text = "A hydra 漢字 has 🐉 heads.";
        let ids = tokenizer().encode(text).unwrap();
        let whole = whole(deltas(text, &[]));
        assert_eq!((whole.text.as_str(), whole.finish), (text, Some(Finish::EndOfText)));
        assert_eq!(whole.pieces.iter().map(|piece| piece.token).collect::<Vec<_>>(), ids);
        assert!(whole.pieces.is_sorted_by_key(|piece| piece.offset));
        let at = text.chars().position(|c| c == '🐉').unwrap();
        assert!(whole.pieces.iter().any(|piece| piece.offset == at || piece.offset + 1 == at));
    }

    #[test]
    fn a_stop_string_ends_it_and_what_may_be_one_is_held_back() {
        for (text, stop, wanted, finish) in [
            ("one two three", "tw", "one ", Finish::Stop),
            ("one two three", " three", "one two", Finish::Stop),
            ("one two three", "threefold", "one two three", Finish::EndOfText),
            ("one", "o", "", Finish::Stop),
        ] {
            let deltas = deltas(text, &[stop]);
            let mut shown = String::new();
            for delta in &deltas {
                shown += &delta.text;
                assert!(wanted.starts_with(&shown), "{shown:?} of {text:?}");
            }
            let whole = whole(deltas);
            assert_eq!((whole.text.as_str(), whole.finish), (wanted, Some(finish)), "{text:?} up to {stop:?}");
            assert!(whole.pieces.iter().all(|piece| piece.offset < wanted.chars().count().max(1)));
        }
    }

    #[test]
    fn an_echo_is_the_prompt_without_a_search_for_stop_strings() {
        let tokenizer = tokenizer();
        let prompt = tokenizer.encode_prompt("one two").unwrap();
        let mut answer = Answer::new(tokenizer.stream(), vec!["two".into()], vec![1]).unwrap();
        let echo = answer.echo(&prompt, Vec::new()).unwrap();
        assert_eq!((echo.text.as_str(), echo.pieces.len()), ("one two", prompt.len()));
        let next = tokenizer.encode(" three").unwrap()[0];
        let delta = answer.push(next, None, None).unwrap();
        assert_eq!((delta.pieces[0].offset, delta.finish), (7, None));
        let last = answer.push(1, None, None).unwrap();
        assert_eq!((last.finish, last.pieces.len(), last.text.as_str()), (Some(Finish::EndOfText), 1, ""));
        assert_eq!(answer.tokens, 1);
    }
}
