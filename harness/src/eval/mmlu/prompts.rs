//! Prompts and their tokens.
//!
//! ```text
//! The following are multiple choice questions (with answers) about {subject}.\n\n
//! letter   {q}\nA. ..\nB. ..\nC. ..\nD. ..\nAnswer:      exemplars go on with " {letter}\n\n"
//! cloze    {q}\nAnswer:                                  exemplars go on with " {text}\n\n"
//! ```
//! [`Style`] changes details of the first.
//! Each prompt is tokenized as a whole. The shared prefix of a subject's prompts is the longest run of tokens that all of them
//! begin with, so computing it once never changes a token.

use super::questions::{Question, Subject};
use super::{Asking, LETTERS, Scoring, Style};
use anyhow::{Result, bail};
use hydra_runtime::tokenizer::Tokenizer;

/// A subject's prompts as tokens.
pub struct Prompts {
    /// The tokens that all prompts begin with.
    pub prefix: Vec<u32>,
    /// The tokens that follow it, for each question; never empty.
    pub rests: Vec<Vec<u32>>,
    /// For cloze scoring, the tokens of each choice's text.
    pub continuations: Vec<[Vec<u32>; 4]>,
}

impl Prompts {
    /// Tokenizes a subject's questions. Fails, naming the question, if one does not fit the model's `context`.
    pub fn new(subject: &Subject, asking: Asking, tokenizer: &Tokenizer, context: usize) -> Result<Self> {
        let (mut whole, mut continuations) = (Vec::new(), Vec::new());
        for (index, question) in subject.test.iter().enumerate() {
            let prompt = tokenizer.encode_prompt(&text(subject, index, asking))?;
            let mut longest = 0;
            if asking.scoring == Scoring::Cloze {
                let mut choices: [Vec<u32>; 4] = Default::default();
                for (ids, text) in choices.iter_mut().zip(&question.choices) {
                    *ids = tokenizer.encode(&format!(" {text}"))?;
                    if ids.is_empty() {
                        bail!("{} {index}: a choice has no tokens", subject.name);
                    }
                    longest = longest.max(ids.len());
                }
                continuations.push(choices);
            }
            let tokens = prompt.len() + longest;
            if tokens > context {
                let (name, shots) = (&subject.name, subject.dev.len());
                let lower = if shots > 0 { "; lower --shots" } else { "" };
                bail!("{name} {index}: expected at most {context} tokens, the model's context, found {tokens}{lower}");
            }
            if prompt.is_empty() {
                bail!("{} {index}: the prompt has no tokens", subject.name);
            }
            whole.push(prompt);
        }
        let shared = shared(&whole);
        let prefix = whole.first().map_or(Vec::new(), |prompt| prompt[..shared].to_vec());
        let rests = whole.into_iter().map(|prompt| prompt[shared..].to_vec()).collect();
        Ok(Self { prefix, rests, continuations })
    }

    /// Number of tokens of all prompts and continuations, prefixes counted each time.
    pub fn tokens(&self) -> usize {
        (0..self.rests.len()).map(|i| self.scored(i, self.prefix.len())).sum()
    }

    /// More tokens than any sequence has: the longest prompt and the longest continuation.
    pub fn longest(&self) -> usize {
        let rest = self.rests.iter().map(Vec::len).max().unwrap_or(0);
        let continuation = self.continuations.iter().flatten().map(Vec::len).max().unwrap_or(0);
        self.prefix.len() + rest + continuation
    }

    /// Number of tokens of question `i`'s sequences, each preceded by `before` tokens: one sequence, or one for each choice.
    pub fn scored(&self, i: usize, before: usize) -> usize {
        let prompt = before + self.rests[i].len();
        match self.continuations.get(i) {
            None => prompt,
            Some(choices) => choices.iter().map(|choice| prompt + choice.len()).sum(),
        }
    }
}

/// The ids of " A" to " D"; of the letter, where a tokenizer splits off the space.
pub fn letter_ids(tokenizer: &Tokenizer) -> Result<[u32; 4]> {
    let mut ids = [0; 4];
    for (id, letter) in ids.iter_mut().zip(LETTERS) {
        match tokenizer.encode(&format!(" {letter}"))?.last() {
            Some(&last) => *id = last,
            None => bail!("the tokenizer has no token for \" {letter}\""),
        }
    }
    Ok(ids)
}

/// The whole prompt of a subject's question.
pub fn text(subject: &Subject, index: usize, asking: Asking) -> String {
    header(subject, asking) + &ask(&subject.test[index], asking)
}

fn header(subject: &Subject, asking: Asking) -> String {
    let name = subject.name.replace('_', " ");
    // The original evaluation puts a space before each word of the name, the first one, too.
    let space = if matches!(asking.style, Some(Style::Hendrycks | Style::Opencompass)) { " " } else { "" };
    let mut text = format!("The following are multiple choice questions (with answers) about {space}{name}.\n\n");
    for question in &subject.dev {
        let answer = match asking.scoring {
            Scoring::Letter => LETTERS[question.answer].to_string(),
            Scoring::Cloze => question.choices[question.answer].clone(),
        };
        text += &format!("{} {answer}\n\n", ask(question, asking));
    }
    text
}

fn ask(question: &Question, asking: Asking) -> String {
    let Question { question, choices: [a, b, c, d], .. } = question;
    let (before, question) = match asking.style {
        Some(Style::LmEval) => ("", question.trim()),
        Some(Style::Helm) => ("Question: ", question.as_str()),
        Some(Style::Hendrycks | Style::Opencompass) | None => ("", question.as_str()),
    };
    let prompt = match asking.scoring {
        Scoring::Letter => format!("{before}{question}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:"),
        Scoring::Cloze => format!("{question}\nAnswer:"),
    };
    match asking.style {
        // Both read the files as text, where Python makes one end of all ends of lines.
        Some(Style::Helm | Style::Opencompass) => prompt.replace("\r\n", "\n").replace('\r', "\n"),
        Some(Style::LmEval | Style::Hendrycks) | None => prompt,
    }
}

/// Length of the longest common prefix that leaves a token of each prompt; 0 for a single prompt.
fn shared(prompts: &[Vec<u32>]) -> usize {
    let [first, others @ ..] = prompts else { return 0 };
    let shortest = prompts.iter().map(Vec::len).min().unwrap_or(0);
    let common = |other: &Vec<u32>| first.iter().zip(other).take_while(|(a, b)| a == b).count();
    others.iter().map(common).min().unwrap_or(0).min(shortest.saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(text: &str) -> Question {
        Question { question: text.into(), choices: ["1", "2", "3", "4"].map(String::from), answer: 1 }
    }

    #[test]
    fn texts() {
        let subject = Subject { name: "high_school_x".into(), dev: vec![question("e?")], test: vec![question("q?")] };
        let letter = header(&subject, Scoring::Letter.into()) + &ask(&subject.test[0], Scoring::Letter.into());
        let about = "The following are multiple choice questions (with answers) about high school x.\n\n";
        assert_eq!(
            letter,
            format!("{about}e?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\nq?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:")
        );
        let cloze = header(&subject, Scoring::Cloze.into()) + &ask(&subject.test[0], Scoring::Cloze.into());
        assert_eq!(cloze, format!("{about}e?\nAnswer: 2\n\nq?\nAnswer:"));
    }

    #[test]
    fn styles() {
        let subject =
            Subject { name: "high_school_x".into(), dev: vec![question("e?")], test: vec![question(" q?\n")] };
        let text = |style| {
            let asking = Asking { scoring: Scoring::Letter, style: Some(style) };
            header(&subject, asking) + &ask(&subject.test[0], asking)
        };
        let choices = "\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:";
        let about = "The following are multiple choice questions (with answers) about";
        let lm_eval = format!("{about} high school x.\n\ne?{choices} B\n\nq?{choices}");
        assert_eq!(text(Style::LmEval), lm_eval);
        let original = format!("{about}  high school x.\n\ne?{choices} B\n\n q?\n{choices}");
        assert_eq!((text(Style::Hendrycks), text(Style::Opencompass)), (original.clone(), original));
        let helm = format!("{about} high school x.\n\nQuestion: e?{choices} B\n\nQuestion:  q?\n{choices}");
        assert_eq!(text(Style::Helm), helm);
        let lines = |style| ask(&question("I.\r\nII."), Asking { scoring: Scoring::Letter, style: Some(style) });
        assert_eq!(lines(Style::Hendrycks), format!("I.\r\nII.{choices}"));
        assert_eq!(lines(Style::Opencompass), format!("I.\nII.{choices}"));
    }

    #[test]
    fn the_common_beginning_leaves_something() {
        assert_eq!(shared(&[vec![1, 2, 3], vec![1, 2, 4, 5]]), 2);
        assert_eq!(shared(&[vec![1, 2], vec![1, 2, 4]]), 1);
        assert_eq!(shared(&[vec![1, 2]]), 0);
        assert_eq!(shared(&[]), 0);
    }
}
