//! A model's own chat template: Jinja as Hugging Face's tokenizers run it, with Python's methods, `raise_exception`,
//! `strftime_now` and `tojson`.
//!
//! A record is one user's turn and one assistant's. What is learnt is the assistant's text and the token that ends the turn:
//! what the template writes behind the text, whitespace at its end left out.

use super::template::jinja;
use anyhow::{Context, Result, bail};
use hydra_runtime::tokenizer::Tokenizer;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, Error, ErrorKind, context};
use std::time::{SystemTime, UNIX_EPOCH};

/// What errors call it.
const OWN: &str = "the model's chat template";

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// Compiles the template of `tokenizer`.
    pub fn new(template: &str, tokenizer: &Tokenizer) -> Result<Self> {
        let token = |id: Option<u32>| id.and_then(|id| tokenizer.token(id)).unwrap_or_default();
        Self::with_tokens(template, token(tokenizer.bos_to_add()), token(tokenizer.eos()))
    }

    fn with_tokens(template: &str, bos: String, eos: String) -> Result<Self> {
        let mut environment = Environment::new();
        environment
            .set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(|e| jinja(&e))?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |why: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, why))
        });
        environment.add_function("strftime_now", strftime_now);
        environment.add_template_owned("chat", template.to_string()).map_err(|e| jinja(&e)).context(OWN)?;
        Ok(Self { environment, bos, eos })
    }

    /// The user's turn, up to where the assistant's text begins.
    pub fn prompt(&self, user: &str) -> Result<String> {
        self.render(vec![context! { role => "user", content => user }], true)
    }

    /// Source, target, and whether the end token still has to follow the target.
    pub fn turn(&self, user: &str, assistant: &str) -> Result<(String, String, bool)> {
        let user_turn = context! { role => "user", content => user };
        let turns = vec![user_turn, context! { role => "assistant", content => assistant }];
        let whole = self.render(turns, false)?;
        // Templates may trim the text; and not every one's generation prompt is what it writes for a turn.
        let text = assistant.trim();
        let prompt = self.prompt(user)?;
        let start = match whole.strip_prefix(&prompt).and_then(|rest| rest.find(text)) {
            Some(gap) if whole[prompt.len()..][..gap].trim().is_empty() => prompt.len(),
            _ => match whole.rfind(text).filter(|_| !text.is_empty()) {
                Some(start) => start,
                None => bail!("the model's chat template does not show the assistant's text"),
            },
        };
        let (source, target) = whole.split_at(start);
        let target = target.trim_end();
        Ok((source.to_string(), target.to_string(), target == text || target.is_empty()))
    }

    fn render(&self, messages: Vec<Value>, add_generation_prompt: bool) -> Result<String> {
        let template = self.environment.get_template("chat").map_err(|e| jinja(&e))?;
        let (bos_token, eos_token) = (&self.bos, &self.eos);
        let text = template.render(context! { messages, add_generation_prompt, bos_token, eos_token });
        text.map_err(|e| jinja(&e)).context(OWN)
    }
}

/// Today in UTC, in the few formats that templates use.
fn strftime_now(format: &str) -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    strftime(format, seconds)
}

fn strftime(format: &str, seconds: u64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let (year, month, day) = civil(seconds / 86_400);
    let name = MONTHS[month as usize - 1];
    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match rest.next() {
            Some('Y') => out += &year.to_string(),
            Some('m') => out += &format!("{month:02}"),
            Some('d') => out += &format!("{day:02}"),
            Some('B') => out += name,
            Some('b') => out += &name[..3],
            Some('H') => out += &format!("{:02}", seconds / 3600 % 24),
            Some('M') => out += &format!("{:02}", seconds / 60 % 60),
            Some('S') => out += &format!("{:02}", seconds % 60),
            Some(other) => out.extend(['%', other]),
            None => out.push('%'),
        }
    }
    out
}

/// Year, month and day of the days since 1970 (Hinnant's `civil_from_days`).
fn civil(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    (year, month, day_of_year - (153 * shifted + 2) / 5 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHATML: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + \
                          '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    #[test]
    fn text_and_end_token_are_learnt() {
        let chat = ChatTemplate::with_tokens(CHATML, String::new(), "<|im_end|>".into()).unwrap();
        let (source, target, end) = chat.turn("Hi", "Hello!").unwrap();
        assert_eq!(source, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
        assert_eq!((target.as_str(), end), ("Hello!<|im_end|>", false));
    }

    #[test]
    fn python_and_hugging_face_helpers() {
        let llama2 = "{% if messages[0].role.startswith('x') %}{{ raise_exception('no') }}{% endif %}{{ bos_token }}\
                      {% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content.strip() }} [/INST]\
                      {% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}";
        let chat = ChatTemplate::with_tokens(llama2, "<s>".into(), "</s>".into()).unwrap();
        let (source, target, end) = chat.turn(" Hi ", "Yes").unwrap();
        assert_eq!((source.as_str(), target.as_str(), end), ("<s>[INST] Hi [/INST]", " Yes </s>", false));
        let raises =
            ChatTemplate::with_tokens("{{ raise_exception('no system turn') }}", String::new(), String::new()).unwrap();
        let error = format!("{:#}", raises.prompt("Hi").unwrap_err());
        assert!(error.starts_with(OWN) && error.ends_with("no system turn"), "{error}");
    }

    #[test]
    fn dates() {
        assert_eq!(strftime("%d %b %Y, %B %m %H:%M:%S", 1_709_210_096), "29 Feb 2024, February 02 12:34:56");
    }
}
