//! A model's own chat template: Jinja as Hugging Face's transformers run it, with Python's string methods, `raise_exception`,
//! `strftime_now` and `tojson`, within the limits of `chat/sandbox.rs` and `chat/cost.rs`.

mod checks;
mod conversation;
mod cost;
mod instruction;
mod json;
mod objects;
mod python;
mod remainder;
mod sandbox;

pub use conversation::{Conversation, MaskedTokens};
pub use instruction::{InstructionTemplate, Texts};

use crate::error::printable;
use crate::tokenizer::{NamedTokens, Tokenizer};
use crate::{Error, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, ErrorKind, State, context};

/// What errors call it.
const OWN: &str = "the chat template";
/// Its name in the environment.
const NAME: &str = "chat";

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// "system", "user", "assistant", or whatever else the template knows.
    pub role: String,
    /// The text.
    pub content: String,
}

impl Message {
    /// An instruction to the model, before the conversation.
    pub fn system(content: impl Into<String>) -> Self {
        Self { role: "system".into(), content: content.into() }
    }

    /// The user's turn.
    pub fn user(content: impl Into<String>) -> Self {
        Self { role: "user".into(), content: content.into() }
    }

    /// The model's turn.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self { role: "assistant".into(), content: content.into() }
    }

    fn value(&self) -> Value {
        let Self { role, content } = self;
        context! { role, content }
    }
}

/// A compiled chat template.
///
/// It may come from a stranger: work, text and nesting have limits that real templates don't reach (four million
/// instructions, 64 MiB of text, lists of 100,000 values, 64 levels). Beyond them rendering is an error.
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// The texts of the special tokens that have a name, which templates use as variables.
    special: NamedTokens,
    /// Whether the template marks what the assistant writes.
    marks: bool,
}

impl ChatTemplate {
    /// The template of the tokenizer's model. Fails if it has none, or it can't be compiled.
    pub fn of(tokenizer: &Tokenizer) -> Result<Self> {
        match tokenizer.chat_template() {
            Some(template) => Self::new(template, tokenizer),
            None => Err(Error::Template("the model has no chat template".into())),
        }
    }

    /// Compiles a template; the special tokens are the tokenizer's.
    pub fn new(template: &str, tokenizer: &Tokenizer) -> Result<Self> {
        Self::with_special(template, tokenizer.named_tokens().clone())
    }

    #[cfg(test)]
    fn with_tokens(template: &str, bos: String, eos: String) -> Result<Self> {
        Self::with_special(template, [("bos_token".into(), bos), ("eos_token".into(), eos)].into())
    }

    fn with_special(template: &str, mut special: NamedTokens) -> Result<Self> {
        // A template may put these into a sum even where the model has none.
        for name in ["bos_token", "eos_token"] {
            special.entry(name.into()).or_default();
        }
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        let syntax = syntax.map_err(|error| refused(OWN, &error))?;
        // Jinja takes any line's end for a newline.
        let template = template.replace("\r\n", "\n").replace('\r', "\n");
        let (source, marks) = conversation::generation_as_filter(&template, &syntax);
        let mut environment = sandbox::environment(NAME, &source, syntax).map_err(|error| refused(OWN, &error))?;
        environment.add_filter(conversation::GENERATION, |state: &State, body: String| {
            let marked = state.lookup(conversation::MARKED).is_some_and(|marked| marked.is_true());
            if marked { conversation::marked(&body) } else { body }
        });
        environment.set_unknown_method_callback(python::method);
        environment.add_function("raise_exception", |why: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, why))
        });
        environment.add_function("strftime_now", strftime_now);
        Ok(Self { environment, special, marks })
    }

    /// A conversation, up to where the assistant's next text begins.
    pub fn prompt(&self, messages: &[Message]) -> Result<String> {
        self.render(messages, true)
    }

    /// One exchange for training: what comes before the assistant's text, that text with what ends the turn (without whitespace at its
    /// end), and whether the end-of-text token has still to follow it.
    pub fn exchange(&self, user: &str, assistant: &str) -> Result<Texts> {
        let [asked, answered] = [Message::user(user), Message::assistant(assistant)];
        let messages = [asked, answered];
        conversation::without_marks(&messages)?;
        let whole = self.render(&messages, false)?;
        let conversation::Part { place, ended } = self.part(&messages, 1, &whole)?;
        let (source, target) = whole.split_at(place.start);
        let target = target.trim_end();
        let target_end = !ended;
        Ok(Texts { source: source.into(), source_end: false, target: target.into(), target_end })
    }

    fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        self.render_with(messages, add_generation_prompt, false)
    }

    /// The whole conversation, with marks around generation blocks.
    fn render_marked(&self, messages: &[Message]) -> Result<String> {
        self.render_with(messages, false, true)
    }

    fn render_with(&self, messages: &[Message], add_generation_prompt: bool, hydra_marked: bool) -> Result<String> {
        let messages: Vec<_> = messages.iter().map(Message::value).collect();
        let special = Value::from_pairs(self.special.iter());
        // Templates ask whether these are none, which is another thing than undefined.
        let [tools, documents] = [Value::from(()), Value::from(())];
        let context = context! { messages, tools, documents, add_generation_prompt, hydra_marked, ..special };
        sandbox::render(&self.environment, NAME, context).map_err(|error| refused(OWN, &error))
    }
}

/// Jinja's error without its copy of the template.
fn refused(what: &str, error: &minijinja::Error) -> Error {
    let line = error.line().map_or(String::new(), |line| format!(" in line {line}"));
    // What a writer refuses comes with its own reason.
    let reason = std::error::Error::source(error).map(|source| format!(": {source}"));
    let detail = error.detail().map(|detail| format!(": {}", printable(detail)));
    let detail = reason.or(detail).unwrap_or_default();
    Error::Template(format!("{what}{line}: {}{detail}", error.kind()))
}

/// The local time now, as Python's `strftime` writes it.
fn strftime_now(format: &str) -> Result<String, minijinja::Error> {
    strftime(format, &jiff::Zoned::now())
}

/// Bytes of a format of a time.
const MOST_TIME_FORMAT: usize = 1_000;

fn strftime(format: &str, time: &jiff::Zoned) -> Result<String, minijinja::Error> {
    let refused = |why: String| minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {why}"));
    if format.len() > MOST_TIME_FORMAT {
        return Err(refused(format!("a format of more than {MOST_TIME_FORMAT} bytes")));
    }
    jiff::fmt::strtime::format(format, time).map_err(|error| refused(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHATML: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + \
                          '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    #[test]
    fn text_and_end_token_are_learnt() {
        let chat = ChatTemplate::with_tokens(CHATML, String::new(), "<|im_end|>".into()).unwrap();
        let texts = chat.exchange("Hi", "Hello!").unwrap();
        assert_eq!(texts.source, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
        assert_eq!((texts.target.as_str(), texts.target_end), ("Hello!<|im_end|>", false));
    }

    #[test]
    fn conversations_end_where_the_assistant_begins() {
        let chat = ChatTemplate::with_tokens(CHATML, String::new(), "<|im_end|>".into()).unwrap();
        let messages =
            [Message::system("Be brief."), Message::user("Hi"), Message::assistant("Yes?"), Message::user("1+1")];
        let text = chat.prompt(&messages).unwrap();
        assert!(
            text.starts_with("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"),
            "{text}"
        );
        assert!(text.ends_with("Yes?<|im_end|>\n<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"), "{text}");
    }

    #[test]
    fn python_and_hugging_face_helpers() {
        let llama2 = "{% if messages[0].role.startswith('x') %}{{ raise_exception('no') }}{% endif %}{{ bos_token }}\
                      {% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content.strip() }} [/INST]\
                      {% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}";
        let chat = ChatTemplate::with_tokens(llama2, "<s>".into(), "</s>".into()).unwrap();
        let texts = chat.exchange(" Hi ", "Yes").unwrap();
        assert_eq!((texts.source.as_str(), texts.target.as_str()), ("<s>[INST] Hi [/INST]", " Yes </s>"));
        assert!(!texts.target_end);
        let raises =
            ChatTemplate::with_tokens("{{ raise_exception('no system turn') }}", String::new(), String::new()).unwrap();
        let error = raises.prompt(&[Message::user("Hi")]).unwrap_err().to_string();
        assert!(error.starts_with(OWN) && error.ends_with("no system turn"), "{error}");
        assert!(ChatTemplate::with_tokens("{% if %}", String::new(), String::new()).is_err());
    }

    /// As transformers' `apply_chat_template` renders them.
    #[test]
    fn json_and_what_is_not_given() {
        let text = |template: &str| {
            let chat = ChatTemplate::with_tokens(template, String::new(), String::new()).unwrap();
            chat.prompt(&[Message::user("Tom's é < b & \"c\"\n")]).unwrap()
        };
        assert_eq!(text("{{ messages[0].content | tojson }}"), r#""Tom's é < b & \"c\"\n""#);
        assert_eq!(text("{{ messages[0].content | tojson(ensure_ascii=True) }}"), r#""Tom's \u00e9 < b & \"c\"\n""#);
        let value = "{'b': [1, none, true], 'a': {}, 'c': 1.5}";
        assert_eq!(text(&format!("{{{{ {value} | tojson }}}}")), r#"{"b": [1, null, true], "a": {}, "c": 1.5}"#);
        let options = "sort_keys=True, separators=(',', ':')";
        assert_eq!(text(&format!("{{{{ {value} | tojson({options}) }}}}")), r#"{"a":{},"b":[1,null,true],"c":1.5}"#);
        let indented = "{\n  \"b\": [\n    1,\n    null,\n    true\n  ],\n  \"a\": {},\n  \"c\": 1.5\n}";
        assert_eq!(text(&format!("{{{{ {value} | tojson(indent=2) }}}}")), indented);
        assert_eq!(text("{% if tools is none and documents is none and not tools %}none{% endif %}"), "none");
        assert_eq!(text("{% if tools is not defined %}undefined{% endif %}"), "");
        assert_eq!(text("a\r\nb\rc{{ '\r\n' }}"), "a\nb\nc\n");
    }

    /// What is said about a template when it is compiled or rendered.
    fn refusal(template: &str) -> String {
        let chat = ChatTemplate::with_tokens(template, String::new(), String::new());
        let said = chat.and_then(|chat| chat.prompt(&[Message::user("Hi")])).expect_err(template).to_string();
        assert!(said.starts_with(OWN) && !said.contains('\n') && said.len() < 300, "{said}");
        said
    }

    #[test]
    fn templates_that_would_never_end_or_take_all_memory() {
        let looks = |what: &str| {
            let texts = "{% set s = 'a' * 10000000 %}{% set t = 'a' * 9999999 ~ 'b' %}";
            format!("{texts}{{% for i in range(100000) %}}{{% if {what} %}}{{% endif %}}{{% endfor %}}")
        };
        let deep = format!("{{% set x = {}1{} %}}{{{{ x }}}}", "[".repeat(70), "]".repeat(70));
        for (template, wanted) in [
            // Recursion without an end.
            ("{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}", "a namespace in a namespace"),
            ("{% set ns = namespace() %}{% set ns.x = [ns] %}{{ ns ~ '' }}", "a namespace in a list or map"),
            ("{% set ns = namespace(a=namespace()) %}{{ ns }}", "a namespace in a list or map"),
            ("{% set ns = namespace() %}{% set c = cycler(ns) %}", "a namespace in a list or map"),
            ("{% set c = cycler(cycler(1)) %}", "cycler: expected texts, numbers, lists and maps"),
            ("{% set c = cycler([joiner()]) %}", "cycler: expected texts, numbers, lists and maps"),
            ("{% set c = cycler([1] * 1000000) %}", "a list or map of more than 100000 values"),
            ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
            ("{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}", "recursion"),
            ("{% include 'chat' %}", "unknown statement"),
            // Huge texts and lists.
            ("{{ 'a' | indent(91841048576) }}", "fuel"),
            ("{{ 'a' * 10000000000 }}", "fuel"),
            ("{{ '%10000000000s' | format('a') }}", "a format of more than 4 digits"),
            ("{{ '{:>10000000000}'.format('a') }}", "a format of more than 4 digits"),
            ("{{ ('{0:>9999}' * 1000000).format('a') }}", "a format that may write more than 64 MiB"),
            ("{{ ('{0[0]:>9999}' * 300000).format(['a']) }}", "a format that may write more than 64 MiB"),
            ("{{ ('{0}' * 100000).format('a' * 1000000) }}", "a format that may write more than 64 MiB"),
            ("{{ ('%(a)s' * 1000) | format(a='a' * 1000000) }}", "a format that may write more than 64 MiB"),
            ("{{ '%10000000000s' % 'a' }}", "a format of more than 4 digits"),
            ("{{ ('%9999s' * 100000) % 'a' }}", "a format that may write more than 64 MiB"),
            ("{{ ('%(a)s' * 1000) % {'a': 'a' * 1000000} }}", "a format that may write more than 64 MiB"),
            ("{{ '%s%s' % ([1] * 10000000, 1) }}", "a list or map of more than 100000 values"),
            // What takes longer than the text that it takes or makes.
            ("{{ (['a' * 700] * 90000) | sum(start='') }}", "sum adds numbers only"),
            ("{{ [[1]] | sum(start=[]) }}", "sum adds numbers only"),
            ("{{ ('a' * 2000000).strip('b' * 100000 ~ 'a') }}", "fuel"),
            ("{{ ('a' * 2000000) | trim('b' * 100000 ~ 'a') }}", "fuel"),
            ("{{ ('a' * 40000000).split('') }}", "a text of more than 100000 parts"),
            ("{{ ('a ' * 20000000) | split }}", "a text of more than 100000 parts"),
            ("{{ ('\\n' * 40000000).splitlines() }}", "a text of more than 100000 parts"),
            ("{{ ('\\n' * 40000000) | lines }}", "a text of more than 100000 parts"),
            ("{{ ('\\r' * 40000000).splitlines() }}", "a text of more than 100000 parts"),
            ("{{ ('a\\x1c' * 20000000).rsplit() }}", "a text of more than 100000 parts"),
            ("{{ ('a,' * 20000000).rsplit(',') }}", "a text of more than 100000 parts"),
            ("{{ ('\\n' * 1000000) | indent('a' * 1000000) }}", "fuel"),
            ("{{ 'a'.center(10000000000) }}", "fuel"),
            ("{{ 'a'.zfill(10000000000) }}", "fuel"),
            ("{{ ('a' * 1000000).replace('', 'b' * 1000000) }}", "fuel"),
            ("{{ strftime_now('%c' * 20000000) }}", "a format of more than 1000 bytes"),
            // Many looks at a long text, which take no fuel by themselves.
            (&looks("s == t"), "fuel"),
            (&looks("[s] < [t]"), "fuel"),
            (&looks("t in [s]"), "fuel"),
            (&looks("t is in [s]"), "fuel"),
            (&looks("t is eq s"), "fuel"),
            (&looks("s is startingwith t"), "fuel"),
            (&looks("s is endingwith s"), "fuel"),
            (&looks("s is lower"), "fuel"),
            (&looks("s.startswith([t])"), "fuel"),
            (&looks("s.startswith('b', 9999999)"), "fuel"),
            (&looks("s.find('b')"), "fuel"),
            (&looks("s.isdigit()"), "fuel"),
            (&looks("s.partition('b')"), "fuel"),
            (&looks("s.removeprefix(t)"), "fuel"),
            (&looks("s.rsplit('b', 1)"), "fuel"),
            (&looks("[s].index(s)"), "fuel"),
            (&looks("[s].count(t)"), "fuel"),
            (&looks("s[-1]"), "fuel"),
            (&looks("s[9999999:]"), "fuel"),
            (&looks("{s: 1}"), "fuel"),
            (&looks("messages[0][s]"), "fuel"),
            (&looks("'a' | replace(s, t)"), "fuel"),
            (&looks("[s, t] | sort"), "fuel"),
            (&looks("[s, t] | unique"), "fuel"),
            (&looks("[s, t] | max"), "fuel"),
            (&looks("[{'x': s}, {'x': t}] | groupby('x')"), "fuel"),
            (&looks("1 %}{% endif %}{% for c in s %}{% break %}{% endfor %}{% if 1"), "fuel"),
            // Calls within calls.
            ("{{ 'a' | map(*(['map'] * 90000)) }}", "map of map"),
            (&format!("{{% if 0 %}}{}{{% endif %}}", "{% elif 0 %}".repeat(20_000)), "more than 200 conditions"),
            // A namespace of large values, and lists of lists that are read twice each.
            (
                "{% set ns = namespace() %}{% set ns.a = ['a' * 40000000] %}{% set ns.b = ns.a %}{{ ns ~ '' }}",
                "a list or map of more than 100000 values or 64 MiB",
            ),
            (
                &("{% set x = [1] %}".to_string() + &"{% set x = x|zip(x) %}".repeat(64) + "{{ x }}"),
                "a list or map of more",
            ),
            ("{{ [] | chain(*([[]] * 1000)) }}", "at most 64 values"),
            ("{{ [1] * 10000000000 }}", "too large"),
            ("{{ ([1] * 200000) ~ '' }}", "a list or map of more than 100000 values"),
            ("{{ ([1] * 200000) | string }}", "a list or map of more than 100000 values"),
            ("{{ ([[1] * 90000] * 90000) | tojson }}", "a list or map of more than 100000 values"),
            ("{{ [1] | tojson(indent=10000000000) }}", "at most 16 spaces"),
            ("{{ [1] | batch(10000000000, 'x') }}", "fuel"),
            ("{{ range(10000000000) | list }}", "too many elements"),
            (
                &("{% set x = [1] %}".to_string() + &"{% set x = [x, x] %}".repeat(64) + "{{ x }}"),
                "a list or map of more",
            ),
            (
                &("{% set x = [1] %}".to_string() + &"{% set x = x + x %}".repeat(64) + "{{ x }}"),
                "a list or map of more",
            ),
            (
                &("{% set x = 1 %}".to_string() + &"{% set x = [x] %}".repeat(65) + "{{ x }}"),
                "nested more than 64 times",
            ),
            (&deep, "nested more than 64 times"),
            ("{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}", "fuel"),
            // Much text and long work.
            (
                "{% for i in range(100000) %}{% for i in range(100000) %}{{ 'x' * 1000 }}{% endfor %}{% endfor %}",
                "64 MiB",
            ),
            ("{% for i in range(100000) %}{% for i in range(100000) %}{% endfor %}{% endfor %}", "fuel"),
        ] {
            let said = refusal(template);
            assert!(said.contains(wanted), "{said}");
        }
    }

    /// One upon another, values that go through others as they are read would never end, or end the stack.
    #[test]
    fn lists_made_of_lists_are_lists() {
        let text = |template: &str| {
            let chat = ChatTemplate::with_tokens(template, String::new(), String::new()).unwrap();
            chat.prompt(&[Message::user("Hi")]).unwrap()
        };
        for more in ["x|chain(x)", "x|zip(x)", "x + x", "x[:]", "x|reverse", "x * 2"] {
            let many = format!("{{% set x = {more} %}}").repeat(2000);
            assert_eq!(text(&format!("{{% set x = [] %}}{many}{{{{ x }}}}")), "[]");
            let (x, times) = (more.replace('x', "ns.x"), 20_000);
            let template = format!("{{% for i in range({times}) %}}{{% set ns.x = {x} %}}{{% endfor %}}{{{{ ns.x }}}}");
            assert_eq!(text(&format!("{{% set ns = namespace(x=[]) %}}{template}")), "[]");
            let given = format!("{{% macro m(x, n) %}}{{{{ m({more}, n - 1) if n else x }}}}{{% endmacro %}}");
            assert_eq!(text(&format!("{given}{{{{ m([], 25) }}}}")), "[]");
        }
        assert_eq!(
            text("{{ {'a': 1}|chain({'b': 2, 'a': 3}) }}{{ [1]|chain((2, 3), 'ab') }}"),
            "{'a': 3, 'b': 2}[1, 2, 3, 'a', 'b']"
        );
        assert_eq!(
            text("{% set x = [1, 2, 3][1:] %}{{ x is sequence }}{{ x[-1] }}{{ {'a': 'b'}['a'] }}{{ (1, 2)[1] }}"),
            "True3b2"
        );
        assert_eq!(
            text("{{ '{} {:>5} {{x}}'.format(1, 'a') }}{{ '%s-%05d%%' | format('a', 3) }}"),
            "1     a {x}a-00003%"
        );
        assert_eq!(
            text("{{ ' a b '.split() }}{{ 'a,b,c'.split(',', 1)[-1] }}{{ 'xax'.strip('x') }}"),
            "['a', 'b']b,ca"
        );
    }

    #[test]
    fn templates_as_they_are_written_stay_within_the_limits() {
        let template = "{%- set ns = namespace(found=false, text='') -%}{%- set system = messages[0].content ~ '' -%}\
            {%- for message in messages[1:] + [] -%}{%- if loop.index0 % 2 == 1 and loop.previtem -%}\
            {%- set ns.found = true -%}{%- endif -%}{%- set ns.text = ns.text ~ message.content -%}\
            {%- set roles = ['user', 'assistant'] + [message.role] -%}{{ roles | tojson(indent=2) | length }}{%- endfor -%}\
            {{ {'a': [1, (2, 3)]} | tojson }}{{ '=' * 3 }}{{ system }}{{ ns.text }}{{ ns.found }}";
        let chat = ChatTemplate::with_tokens(template, String::new(), String::new()).unwrap();
        let turns = [Message::system("S"), Message::user("a"), Message::assistant("b"), Message::user("c")];
        let text = chat.prompt(&turns).unwrap();
        assert_eq!(text, "374237{\"a\": [1, [2, 3]]}===SabcTrue");
        // A long conversation; also in a template that gathers its turns, where each turn is looked at many times.
        let chat = ChatTemplate::with_tokens(CHATML, String::new(), String::new()).unwrap();
        let turns: Vec<_> = (0..20_000).map(|_| Message::user("x".repeat(500))).collect();
        assert!(chat.prompt(&turns).unwrap().len() > 10_000_000);
        let template = "{% set ns = namespace(all=[]) %}{% for m in messages %}{% set ns.all = ns.all + [m] %}{% endfor %}\
            {{ ns.all | map(attribute='content') | join }}";
        let chat = ChatTemplate::with_tokens(template, String::new(), String::new()).unwrap();
        assert_eq!(chat.prompt(&turns[..1000]).unwrap().len(), 500_000);
    }

    #[test]
    fn dates() {
        let time = jiff::Timestamp::from_second(1_709_210_096).unwrap().to_zoned(jiff::tz::TimeZone::UTC);
        assert_eq!(strftime("%d %b %Y, %B %m %H:%M:%S", &time).unwrap(), "29 Feb 2024, February 02 12:34:56");
        assert!(strftime("%!", &time).is_err());
        assert_eq!(strftime_now("%Y").unwrap().len(), 4);
    }
}
