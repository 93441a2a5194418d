//! A conversation for training: its text, and the parts of it that the assistant writes.
//!
//! A template says which parts these are with `{% generation %} .. {% endgeneration %}`, as in Hugging Face's transformers. For
//! a template without these marks they are found by rendering the conversation up to each assistant message and through it.

use super::{ChatTemplate, Message, OWN};
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};
use minijinja::machinery::{Span, Token, tokenize};
use minijinja::syntax::SyntaxConfig;
use std::ops::Range;

/// What surrounds a generation block in marked text. Unicode reserves these two for such use: they are no characters.
const BEGIN: char = '\u{FDD0}';
const END: char = '\u{FDD1}';

/// The filter that a generation block becomes, and the variable that switches its marks on.
pub(super) const GENERATION: &str = "hydra_generation";
pub(super) const MARKED: &str = "hydra_marked";

/// A conversation as the template writes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conversation {
    /// The whole text.
    pub text: String,
    /// The assistant's parts as byte ranges of `text`, ascending: each message with what ends its turn.
    pub assistant: Vec<Range<usize>>,
    /// Whether the end-of-text token has still to follow: the template writes none after the last message.
    pub open: bool,
}

/// Tokens with their loss mask.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MaskedTokens {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// The loss mask, as long as `tokens`: true for what the assistant writes, and for a token across the edge of that.
    pub mask: Vec<bool>,
}

impl Conversation {
    /// The tokens of the text as a whole, behind the beginning-of-text token if the tokenizer adds one and the text has none.
    pub fn tokens(&self, tokenizer: &Tokenizer) -> Result<MaskedTokens> {
        let mut masked = MaskedTokens::default();
        let mut parts = self.assistant.iter().peekable();
        for (id, place) in tokenizer.encode_with_offsets(&self.text)? {
            while parts.next_if(|part| part.end <= place.start).is_some() {}
            masked.tokens.push(id);
            masked.mask.push(parts.peek().is_some_and(|part| part.start < place.end));
        }
        if let Some(bos) = tokenizer.bos_to_add().filter(|bos| masked.tokens.first() != Some(bos)) {
            masked.tokens.insert(0, bos);
            masked.mask.insert(0, false);
        }
        if self.open {
            let eos = tokenizer.eos();
            let none = || Error::Tokenizer("the model names no EOS token to end an answer with".into());
            masked.tokens.push(eos.ok_or_else(none)?);
            masked.mask.push(true);
        }
        Ok(masked)
    }
}

impl ChatTemplate {
    /// A conversation for training.
    ///
    /// A message's part ends with what ends its turn, without whitespace after it; a template's own marks are taken as they are.
    /// Fails if the template does not show a message of the assistant, or not as it shows it at the end of a conversation.
    pub fn conversation(&self, messages: &[Message]) -> Result<Conversation> {
        without_marks(messages)?;
        if self.marks {
            return unmarked(&self.render_marked(messages)?);
        }
        let text = self.render(messages, false)?;
        let (mut assistant, mut open) = (Vec::new(), false);
        for (i, message) in messages.iter().enumerate().filter(|(_, message)| message.role == "assistant") {
            let Part { place, ended } = self.part(messages, i, &text)?;
            open = !ended && i + 1 == messages.len() && !message.content.is_empty();
            assistant.push(place);
        }
        let text = if open { text.trim_end().to_string() } else { text };
        Ok(Conversation { text, assistant, open })
    }

    /// The part of message `i` of the assistant in `whole`, the text of the whole conversation.
    pub(super) fn part(&self, messages: &[Message], i: usize, whole: &str) -> Result<Part> {
        let until = self.render(&messages[..=i], false)?;
        let Some((_, ending)) = self.around(&messages[..=i], i, &until)? else {
            return Err(not_shown(i, "does not show"));
        };
        let ending = ending.trim_end();
        // What is written before the message may differ at the end of a conversation, such as an empty thinking block.
        let Some((before, behind)) = self.around(messages, i, whole)?.filter(|(_, behind)| behind.starts_with(ending))
        else {
            return Err(not_shown(i, "shows differently in the whole conversation than at its end"));
        };
        let end = whole.len() - behind.len() + ending.len();
        // Whitespace after the prompt is the assistant's; anything else there is the template's.
        let prompt = self.prompt(&messages[..i])?;
        let only_space = before.strip_prefix(&prompt).is_some_and(|gap| gap.trim().is_empty());
        let start = if only_space { prompt.len() } else { before.len() };
        Ok(Part { place: start..end, ended: !ending.is_empty() })
    }

    /// What stands before and behind the words of message `i` in the text of `messages`: as where a mark stands in their place, for
    /// the same words may be elsewhere, too. `None` if they are not there.
    fn around<'t>(&self, messages: &[Message], i: usize, text: &'t str) -> Result<Option<(&'t str, &'t str)>> {
        let content = &messages[i].content;
        // Templates may trim the message.
        let own = content.trim();
        let mut marked = messages.to_vec();
        marked[i].content = content.replacen(own, &BEGIN.to_string(), 1);
        let marked = self.render(&marked, false)?;
        let Some((before, behind)) = marked.rsplit_once(BEGIN) else { return Ok(None) };
        let head = text.strip_suffix(behind).and_then(|head| head.strip_suffix(own));
        // A template may leave out a message without words.
        let head = head.filter(|&head| !own.is_empty() || head == before);
        Ok(head.map(|head| (head, &text[text.len() - behind.len()..])))
    }
}

/// An error if a message has a character that is a mark here.
pub(super) fn without_marks(messages: &[Message]) -> Result<()> {
    if messages.iter().any(|message| message.content.contains([BEGIN, END])) {
        return Err(Error::Template(format!("a message contains U+{:X} or U+{:X}", BEGIN as u32, END as u32)));
    }
    Ok(())
}

/// Where a message of the assistant is.
pub(super) struct Part {
    pub place: Range<usize>,
    /// Whether something ends its turn.
    pub ended: bool,
}

fn not_shown(i: usize, what: &str) -> Error {
    let advice = "a template with {% generation %} marks, or conversations that end there, avoid that";
    Error::Template(format!("{OWN} {what} message {} (assistant): {advice}", i + 1))
}

/// A text without its marks, and what was between them.
fn unmarked(marked: &str) -> Result<Conversation> {
    let (mut text, mut assistant, mut begun) = (String::with_capacity(marked.len()), Vec::new(), None);
    for piece in marked.split_inclusive([BEGIN, END]) {
        let mark = piece.chars().next_back().filter(|&mark| mark == BEGIN || mark == END);
        text += &piece[..piece.len() - mark.map_or(0, char::len_utf8)];
        match (mark, begun) {
            (None, _) => {}
            (Some(BEGIN), None) => begun = Some(text.len()),
            (Some(END), Some(start)) => {
                assistant.push(start..text.len());
                begun = None;
            }
            _ => return Err(Error::Template(format!("{OWN} has a {{% generation %}} block inside another"))),
        }
    }
    assistant.retain(|part| !part.is_empty());
    Ok(Conversation { text, assistant, open: false })
}

/// The body of a generation block between its marks.
pub(super) fn marked(body: &str) -> String {
    format!("{BEGIN}{body}{END}")
}

/// The source with `{% generation %}` as a block of the filter [`GENERATION`], and whether it has any.
pub(super) fn generation_as_filter(source: &str, syntax: &SyntaxConfig) -> (String, bool) {
    let tokens: Result<Vec<(Token<'_>, Span)>, _> = tokenize(source, false, syntax.clone()).collect();
    // A source that can't be split into tokens is refused when it is compiled.
    let Ok(tokens) = tokens else { return (source.into(), false) };
    let (mut text, mut done) = (String::with_capacity(source.len()), 0);
    for window in tokens.windows(3) {
        let [(Token::BlockStart, _), (Token::Ident(name), span), (Token::BlockEnd, _)] = window else { continue };
        let filter = match *name {
            "generation" => format!("filter {GENERATION}"),
            "endgeneration" => "endfilter".to_string(),
            _ => continue,
        };
        text += &source[done..span.start_offset as usize];
        text += &filter;
        done = span.end_offset as usize;
    }
    (text + &source[done..], done > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(template: &str, messages: &[Message]) -> Result<(Vec<String>, bool)> {
        let chat = ChatTemplate::with_tokens(template, "<s>".into(), "</s>".into())?;
        let Conversation { text, assistant, open } = chat.conversation(messages)?;
        Ok((assistant.into_iter().map(|part| text[part].to_string()).collect(), open))
    }

    fn turns() -> [Message; 5] {
        let user = |text: &str| Message::user(text);
        let assistant = |text: &str| Message::assistant(text);
        [Message::system("S"), user("a"), assistant("b"), user("b"), assistant("c b")]
    }

    const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}\
                          {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    #[test]
    fn messages_with_what_ends_their_turn() {
        let (found, open) = parts(CHATML, &turns()).unwrap();
        assert_eq!((found, open), (vec!["b<|im_end|>".into(), "c b<|im_end|>".into()], false));
        let chat = ChatTemplate::with_tokens(CHATML, String::new(), String::new()).unwrap();
        let [_, user, answer, ..] = turns();
        let Conversation { text, assistant, .. } = chat.conversation(&[user, answer]).unwrap();
        let texts = chat.exchange("a", "b").unwrap();
        assert_eq!((&text[..assistant[0].start], &text[assistant[0].clone()]), (&*texts.source, &*texts.target));
    }

    #[test]
    fn a_message_that_is_part_of_what_ends_its_turn() {
        let messages = [Message::user("a"), Message::assistant("end"), Message::user("end"), Message::assistant("")];
        assert_eq!(parts(CHATML, &messages).unwrap().0, ["end<|im_end|>", "<|im_end|>"]);
    }

    #[test]
    fn a_template_that_writes_no_end() {
        let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}\
                        {% if add_generation_prompt %}assistant: {% endif %}";
        assert_eq!(parts(template, &turns()).unwrap(), (vec!["b".into(), "c b".into()], true));
        assert_eq!(parts(template, &turns()[..4]).unwrap(), (vec!["b".into()], false));
    }

    /// As Qwen3's: an empty thinking block before the last answer alone, and thoughts only there.
    #[test]
    fn a_template_that_forgets_what_was_thought() {
        let template = "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% set text = m.content %}\
            {% if not loop.last %}{% set text = text.split('</think>')[-1] %}{% elif '</think>' not in text %}\
            <think></think>{% endif %}{{ text }}{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}\
            {% if add_generation_prompt %}<|assistant|>{% endif %}";
        assert_eq!(parts(template, &turns()).unwrap().0, ["b<|end|>", "c b<|end|>"]);
        let mut thinking = turns();
        thinking[2].content = "<think>x</think>b".into();
        let error = parts(template, &thinking).unwrap_err().to_string();
        assert!(error.contains("message 3 (assistant)") && error.contains("differently"), "{error}");
        assert_eq!(parts(template, &thinking[..3]).unwrap().0, ["<think>x</think>b<|end|>"]);
    }

    /// A prompt that begins a thought which the last answer alone shows, closed.
    #[test]
    fn a_prompt_that_is_not_what_a_turn_begins_with() {
        let template = "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' and loop.last %}<think></think>\
            {% endif %}{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}assistant:<think>{% endif %}";
        let user = |text: &str| Message::user(text);
        let turns = [user("Fine, Paris"), Message::assistant("Paris"), user("Paris Fine"), Message::assistant("Fine")];
        assert_eq!(parts(template, &turns).unwrap().0, ["Paris</s>", "Fine</s>"]);
        let chat = ChatTemplate::with_tokens(template, String::new(), String::new()).unwrap();
        let Conversation { text, assistant, .. } = chat.conversation(&turns).unwrap();
        assert!(text[..assistant[0].start].ends_with("assistant:"), "{text}");
    }

    /// Words that are part of what ends a turn, of a role's name and of the text before.
    #[test]
    fn an_answer_is_found_at_its_place() {
        for answer in ["s", "a", "</s>", "assistant", "i", "<|im_start|>", "u", "\n s \n", "b"] {
            for template in ["{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}", CHATML] {
                let turns = [Message::user("b s"), Message::assistant(answer), Message::user("s a")];
                let end = if template == CHATML { "<|im_end|>" } else { "</s>" };
                let found = parts(template, &turns).unwrap().0;
                assert_eq!(found[0].trim_start(), format!("{}{end}", answer.trim_start()), "{template}");
                let chat = ChatTemplate::with_tokens(template, String::new(), String::new()).unwrap();
                let texts = chat.exchange("b s", answer).unwrap();
                assert_eq!(texts.target.trim_start(), found[0].trim_start(), "{template}");
            }
        }
    }

    #[test]
    fn generation_marks() {
        let template = "{{ bos_token }}{% for m in messages %}\n{% if m.role == 'assistant' %}\n  {% generation %}\n\
            {{- m.content }}{{ eos_token }}{%- endgeneration %}\n{% else %}[{{ m.content }}]{% endif %}{% endfor %}";
        assert_eq!(parts(template, &turns()).unwrap(), (vec!["b</s>".into(), "c b</s>".into()], false));
        let chat = ChatTemplate::with_tokens(template, "<s>".into(), "</s>".into()).unwrap();
        assert_eq!(chat.prompt(&turns()[1..]).unwrap(), "<s>[a]b</s>[b]c b</s>");
        assert_eq!(chat.conversation(&turns()[1..]).unwrap().text, "<s>[a]b</s>[b]c b</s>");
        let nested = "{% generation %}{% generation %}{% endgeneration %}{% endgeneration %}";
        assert!(parts(nested, &turns()).unwrap_err().to_string().contains("inside another"));
        assert!(parts("{% generation %}", &turns()).is_err());
    }

    #[test]
    fn what_can_not_be_found() {
        let error = parts("{% for m in messages %}{{ m.role }}{% endfor %}", &turns()).unwrap_err().to_string();
        assert!(error.contains("does not show message 3 (assistant)"), "{error}");
        let error = parts(CHATML, &[Message::user("\u{FDD0}")]).unwrap_err().to_string();
        assert!(error.contains("U+FDD0"), "{error}");
    }
}
