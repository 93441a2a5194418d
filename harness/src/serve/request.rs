//! What clients may ask for: the bodies of `/v1/completions` and `/v1/chat/completions`, read and checked.

use super::error::{ApiError, Result};
use super::fields::{Fields, wrong};
use super::sampling::Sampling;
use hydra_runtime::chat::Message;
use serde_json::Value;

/// The most choices of one prompt.
const MOST_CHOICES: usize = 128;
/// The most prompts of one request.
const MOST_PROMPTS: usize = 1024;
/// The most alternatives whose log-probabilities are reported; OpenAI's chat has 20.
const MOST_LOGPROBS: usize = 20;
/// The most stop strings; OpenAI has 4.
const MOST_STOPS: usize = 16;
/// Tokens of a completion that doesn't say how many; as OpenAI's.
const DEFAULT_TOKENS: usize = 16;

/// What clients send and what makes no difference here.
const IGNORED: [&str; 8] = [
    "user",
    "store",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
];

/// What this server does not have, and the values that ask for nothing: some clients send them always.
const NEUTRAL: [(&str, &str); 10] = [
    ("verbosity", "\"medium\""),
    ("length_penalty", "1"),
    ("min_tokens", "0"),
    ("use_beam_search", "false"),
    ("ignore_eos", "false"),
    ("include_stop_str_in_output", "false"),
    ("continue_final_message", "false"),
    ("add_generation_prompt", "true"),
    ("skip_special_tokens", "true"),
    ("stop_token_ids", "[]"),
];

/// What both kinds of requests have.
#[derive(Debug, PartialEq)]
pub struct Common {
    /// The model's or an adapter's name.
    pub model: String,
    /// The most tokens of an answer; `None`: as many as there is room for.
    pub max_tokens: Option<usize>,
    /// How they are drawn.
    pub sampling: Sampling,
    /// Choices for each prompt.
    pub n: usize,
    /// Texts that end an answer.
    pub stop: Vec<String>,
    /// Whether the answer comes in pieces.
    pub stream: bool,
    /// Whether the last piece says how many tokens there were.
    pub include_usage: bool,
    /// Whether the router's gates of each token are part of the answer: our extension `hydra_gates`.
    pub gates: bool,
}

/// A text, or token ids.
#[derive(Debug, PartialEq)]
pub enum Prompt {
    /// A text, behind the beginning-of-text token if the tokenizer adds one.
    Text(String),
    /// Token ids as they are.
    Tokens(Vec<u32>),
}

/// `POST /v1/completions`.
#[derive(Debug, PartialEq)]
pub struct Completion {
    /// What both kinds have.
    pub common: Common,
    /// One or several.
    pub prompts: Vec<Prompt>,
    /// Whether the answer begins with the prompt.
    pub echo: bool,
    /// The number of alternatives whose log-probabilities are reported.
    pub logprobs: Option<usize>,
}

/// `POST /v1/chat/completions`.
#[derive(Debug, PartialEq)]
pub struct Chat {
    /// What both kinds have.
    pub common: Common,
    /// The conversation.
    pub messages: Vec<Message>,
    /// The number of alternatives whose log-probabilities are reported.
    pub logprobs: Option<usize>,
}

impl Common {
    fn take(fields: &mut Fields, max_tokens: Option<usize>) -> Result<Self> {
        let model = fields.required("model")?;
        let sampling = Sampling::take(fields)?;
        let n = fields.count("n", 1..=MOST_CHOICES)?.unwrap_or(1);
        let stop = fields.strings("stop", MOST_STOPS)?;
        let stream = fields.flag("stream")?;
        let mut options = fields.object("stream_options")?;
        let include_usage = options.flag("include_usage")?;
        options.ignore(&["include_obfuscation"]);
        options.finish()?;
        if include_usage && !stream {
            return Err(ApiError::field("stream_options", "expected only together with \"stream\": true"));
        }
        let gates = fields.flag("hydra_gates")?;
        fields.ignore(&IGNORED);
        for (key, values) in NEUTRAL {
            fields.only(key, values)?;
        }
        Ok(Self { model, max_tokens, sampling, n, stop, stream, include_usage, gates })
    }
}

impl Completion {
    /// From a request's body.
    pub fn parse(body: &[u8]) -> Result<Self> {
        let mut fields = Fields::parse(body)?;
        let echo = fields.flag("echo")?;
        let least = usize::from(!echo);
        let max_tokens = fields.count("max_tokens", least..=usize::MAX)?.unwrap_or(DEFAULT_TOKENS);
        let common = Common::take(&mut fields, Some(max_tokens))?;
        let logprobs = fields.count("logprobs", 0..=MOST_LOGPROBS)?;
        let prompt = fields.take("prompt");
        let prompts = prompts(prompt.ok_or_else(|| ApiError::field("prompt", format!("missing: {PROMPT}")))?)?;
        let n = common.n as u64;
        fields.refuse("best_of", "expected the value of n: only that many are drawn", |v| v.as_u64() == Some(n))?;
        fields.refuse("suffix", "text can't be inserted before a suffix; leave it out", |v| v.as_str() == Some(""))?;
        fields.finish()?;
        Ok(Self { common, prompts, echo, logprobs })
    }
}

/// What a prompt may be.
const PROMPT: &str = "expected a string, a list of strings, a list of token ids, or a list of such lists";

fn prompts(value: Value) -> Result<Vec<Prompt>> {
    let tokens = |list: &[Value]| {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        list.iter().map(id).collect::<Option<Vec<u32>>>().filter(|ids| !ids.is_empty()).map(Prompt::Tokens)
    };
    let one = |value: &Value| match value {
        Value::String(text) => Some(Prompt::Text(text.clone())),
        Value::Array(list) => tokens(list),
        _ => None,
    };
    let problem = || ApiError::field("prompt", PROMPT);
    match &value {
        Value::Array(list) if list.first().is_some_and(|first| !first.is_number()) => {
            if list.len() > MOST_PROMPTS {
                let found = list.len();
                return Err(ApiError::field(
                    "prompt",
                    format!("expected at most {MOST_PROMPTS} prompts, found {found}"),
                ));
            }
            list.iter().map(one).collect::<Option<_>>().ok_or_else(problem)
        }
        single => Ok(vec![one(single).ok_or_else(problem)?]),
    }
}

impl Chat {
    /// From a request's body.
    pub fn parse(body: &[u8]) -> Result<Self> {
        let mut fields = Fields::parse(body)?;
        let (old, new) =
            (fields.count("max_tokens", 1..=usize::MAX)?, fields.count("max_completion_tokens", 1..=usize::MAX)?);
        let common = Common::take(&mut fields, new.or(old))?;
        let alternatives = fields.count("top_logprobs", 0..=MOST_LOGPROBS)?;
        let logprobs = fields.flag("logprobs")?.then(|| alternatives.unwrap_or(0));
        if alternatives.is_some_and(|count| count > 0) && logprobs.is_none() {
            return Err(ApiError::field("top_logprobs", "expected only together with \"logprobs\": true"));
        }
        let list = fields.take("messages").ok_or_else(|| ApiError::field("messages", "missing: expected a list"))?;
        let messages = messages(list)?;
        let empty = |value: &Value| value.as_array().is_some_and(Vec::is_empty);
        for key in ["tools", "functions"] {
            fields.refuse(key, "this server does not call tools; leave it out", empty)?;
        }
        for key in ["tool_choice", "function_call"] {
            fields.refuse(key, "this server does not call tools; leave it out", |value| {
                matches!(value.as_str(), Some("none" | "auto"))
            })?;
        }
        fields.refuse("response_format", "only {\"type\": \"text\"} is supported", |value| value["type"] == "text")?;
        fields.refuse("modalities", "only [\"text\"] is supported", |value| *value == serde_json::json!(["text"]))?;
        fields.finish()?;
        Ok(Self { common, messages, logprobs })
    }
}

fn messages(value: Value) -> Result<Vec<Message>> {
    match value {
        Value::Array(list) if !list.is_empty() => {
            list.into_iter().enumerate().map(|(i, one)| message(one, &format!("messages[{i}]"))).collect()
        }
        other => Err(wrong("messages", "a list of messages that is not empty", &other)),
    }
}

fn message(value: Value, name: &str) -> Result<Message> {
    let mut fields = Fields::of(value, name)?;
    let role = match fields.required("role")?.as_str() {
        "system" | "developer" => "system",
        "user" => "user",
        "assistant" => "assistant",
        "tool" | "function" => {
            return Err(ApiError::unsupported(&fields.name("role"), "this server does not call tools"));
        }
        other => {
            let expected = "expected system, developer, user or assistant";
            let found = hydra_runtime::printable(other);
            return Err(ApiError::field(fields.name("role"), format!("{expected}, found {found:?}")));
        }
    };
    let at = fields.name("content");
    let content = match fields.take("content") {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => parts.into_iter().map(|part| text_part(part, &at)).collect::<Result<_>>()?,
        Some(other) => return Err(wrong(&at, "a string, or a list of parts of type text", &other)),
        None => return Err(ApiError::field(at, "missing: expected a string")),
    };
    let empty = |value: &Value| value.as_array().is_some_and(Vec::is_empty);
    fields.refuse("tool_calls", "this server does not call tools", empty)?;
    fields.refuse("function_call", "this server does not call tools", |_| false)?;
    fields.refuse("audio", "only text is supported", |_| false)?;
    fields.refuse("refusal", "expected the text in content", |value| value == "")?;
    fields.ignore(&["name", "annotations"]);
    fields.finish()?;
    Ok(Message { role: role.into(), content })
}

fn text_part(value: Value, name: &str) -> Result<String> {
    let mut fields = Fields::of(value, name)?;
    if fields.required("type")? != "text" {
        return Err(ApiError::unsupported(name, "only parts of type text are supported"));
    }
    let text = fields.required("text")?;
    fields.finish()?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hydra_runtime::generate;

    fn completion(body: &str) -> Completion {
        Completion::parse(body.as_bytes()).unwrap_or_else(|error| panic!("{body}: {}", error.message))
    }

    #[track_caller]
    fn refused<T: std::fmt::Debug>(parsed: Result<T>, wanted: &str) {
        let error = parsed.expect_err(wanted);
        assert_eq!(error.status, 400, "{error:?}");
        assert!(error.message.contains(wanted), "{wanted:?} in {:?}", error.message);
    }

    #[test]
    fn prompts_of_all_kinds() {
        let prompts = |prompt: &str| completion(&format!("{{\"model\": \"m\", \"prompt\": {prompt}}}")).prompts;
        let text = |text: &str| Prompt::Text(text.into());
        assert_eq!(prompts("\"a\""), [text("a")]);
        assert_eq!(prompts("[\"a\", \"b\"]"), [text("a"), text("b")]);
        assert_eq!(prompts("[1, 2]"), [Prompt::Tokens(vec![1, 2])]);
        assert_eq!(prompts("[[1, 2], [3]]"), [Prompt::Tokens(vec![1, 2]), Prompt::Tokens(vec![3])]);
        for wrong in ["[]", "[[]]", "1", "{}", "[1, \"a\"]", "[-1]", "[1.5]", "[4294967296]", "[[1], 2]", "[true]"] {
            let body = format!("{{\"model\": \"m\", \"prompt\": {wrong}}}");
            refused(Completion::parse(body.as_bytes()), "prompt: expected a string");
        }
    }

    #[test]
    fn defaults_are_openais() {
        let Completion { common, echo, logprobs, .. } = completion("{\"model\": \"m\", \"prompt\": \"a\"}");
        assert_eq!((common.max_tokens, common.n), (Some(16), 1));
        assert!(!echo && logprobs.is_none() && !common.stream && common.stop.is_empty());
        let Sampling { settings, seed, logit_bias } = common.sampling;
        assert_eq!(settings, generate::Sampling { temperature: 1.0, ..Default::default() });
        assert_eq!((seed, logit_bias), (None, Vec::new()));
    }

    #[test]
    fn absurd_values_are_named() {
        for (field, wanted) in [
            ("\"temperature\": -1", "temperature: expected a number from 0 to 2, found -1"),
            ("\"temperature\": \"hot\"", "temperature: expected a number from 0 to 2, found \"hot\""),
            ("\"temperature\": NaN", "the body is not JSON"),
            ("\"temperature\": 1e999", "the body is not JSON"),
            ("\"top_p\": 0", "top_p: expected a number above 0"),
            ("\"n\": 0", "n: expected a whole number from 1 to 128, found 0"),
            ("\"n\": 1.5", "n: expected a whole number"),
            ("\"max_tokens\": 0", "max_tokens: expected a whole number from 1 on"),
            ("\"max_tokens\": -5", "max_tokens: expected a whole number from 1 on, found -5"),
            ("\"seed\": 0.5", "seed: expected a whole number"),
            ("\"stop\": [\"\"]", "stop: expected a string that is not empty"),
            ("\"stop\": 3", "stop: expected"),
            ("\"logprobs\": 21", "logprobs: expected a whole number from 0 to 20"),
            ("\"stream\": 1", "stream: expected true or false, found 1"),
            ("\"stream_options\": {\"include_usage\": true}", "stream_options: expected only together"),
            ("\"stream\": true, \"stream_options\": {\"x\": 1}", "stream_options.x: unknown"),
            ("\"presence_penalty\": 2.5", "presence_penalty: expected a number from -2 to 2, found 2.5"),
            ("\"frequency_penalty\": \"x\"", "frequency_penalty: expected a number from -2 to 2"),
            ("\"logit_bias\": {\"1\": 101}", "logit_bias: expected an object of at most 1024 token ids"),
            ("\"logit_bias\": {\"the\": 1}", "each with a number from -100 to 100, found an object"),
            ("\"logit_bias\": [1]", "found a list of 1"),
            ("\"best_of\": 3", "best_of: expected the value of n"),
            ("\"suffix\": \"x\"", "suffix:"),
            ("\"max_token\": 5", "max_token: unknown"),
            ("\"top_k\": -2", "top_k: expected a whole number from 1 on, or 0 or -1 for all, found -2"),
            ("\"top_k\": 0.5", "top_k: expected a whole number"),
            ("\"min_p\": 1.1", "min_p: expected a number from 0 to 1, found 1.1"),
            ("\"repetition_penalty\": 0", "repetition_penalty: expected a number above 0, found 0"),
            ("\"repetition_penalty\": 1e300", "repetition_penalty: expected a number above 0"),
            ("\"stop_token_ids\": [2]", "stop_token_ids: expected what asks for nothing ([]), found a list of 1"),
        ] {
            let body = format!("{{\"model\": \"m\", \"prompt\": \"a\", {field}}}");
            refused(Completion::parse(body.as_bytes()), wanted);
        }
        refused(Completion::parse(b"[]"), "expected a JSON object");
        refused(Completion::parse(b"{\"prompt\": \"a\"}"), "model: missing");
        refused(Completion::parse(b"{\"model\": \"m\"}"), "prompt: missing");
        refused(Completion::parse("[".repeat(100_000).as_bytes()), "not JSON");
        let ok = "{\"model\": \"m\", \"prompt\": \"a\", \"presence_penalty\": 0, \"logit_bias\": {}, \"best_of\": 1, \"user\": \"u\", \
                  \"echo\": true, \"max_tokens\": 0, \"seed\": -1, \"suffix\": null}";
        assert_eq!(completion(ok).common.sampling.seed, Some(u64::MAX));
        let neutral = "{\"model\": \"m\", \"prompt\": \"a\", \"top_k\": -1, \"min_p\": 0.0, \"repetition_penalty\": 1.0, \"stop_token_ids\": [], \
                       \"ignore_eos\": false, \"verbosity\": \"medium\", \"reasoning_effort\": null, \"anything\": null}";
        assert_eq!(completion(neutral), completion("{\"model\": \"m\", \"prompt\": \"a\"}"));
        let drawn = completion(
            "{\"model\": \"m\", \"prompt\": \"a\", \"frequency_penalty\": -0.5, \"logit_bias\": {\"7\": -100}, \"top_k\": 40, \
             \"min_p\": 0.1, \"repetition_penalty\": 1.5}",
        );
        let Sampling { settings, logit_bias, .. } = drawn.common.sampling;
        let generate::Sampling { frequency_penalty, top_k, min_p, repetition_penalty, .. } = settings;
        assert_eq!((frequency_penalty, logit_bias), (-0.5, vec![(7, -100.0)]));
        assert_eq!((top_k, min_p, repetition_penalty), (40, 0.1, 1.5));
    }

    #[test]
    fn conversations() {
        let body = r#"{"model": "m", "messages": [{"role": "developer", "content": "S"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "x"},
            {"role": "assistant", "content": "c"}], "max_tokens": 5, "max_completion_tokens": 6, "logprobs": true,
            "top_logprobs": 2, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}}"#;
        let chat = Chat::parse(body.as_bytes()).unwrap();
        assert_eq!(chat.messages, [Message::system("S"), Message::user("ab"), Message::assistant("c")]);
        assert_eq!((chat.common.max_tokens, chat.logprobs), (Some(6), Some(2)));
        for (messages, more, wanted) in [
            ("[]", "", "messages: expected a list"),
            ("{}", "", "messages: expected a list"),
            ("[1]", "", "messages[0]: expected an object, found 1"),
            ("[{\"role\": \"king\", \"content\": \"a\"}]", "", "messages[0].role: expected system"),
            ("[{\"role\": \"tool\", \"content\": \"a\"}]", "", "does not call tools"),
            (
                "[{\"role\": \"assistant\", \"content\": \"a\", \"function_call\": {\"name\": \"f\"}}]",
                "",
                "messages[0].function_call: this server does not call tools",
            ),
            (
                "[{\"role\": \"assistant\", \"content\": \"a\", \"audio\": {\"id\": \"x\"}}]",
                "",
                "messages[0].audio: only text",
            ),
            (
                "[{\"role\": \"assistant\", \"content\": \"a\", \"refusal\": \"no\"}]",
                "",
                "messages[0].refusal: expected the text in content",
            ),
            ("[{\"role\": \"user\"}]", "", "messages[0].content: missing"),
            ("[{\"role\": \"user\", \"content\": [{\"type\": \"image_url\"}]}]", "", "only parts of type text"),
            (
                "[{\"role\": \"user\", \"content\": \"a\"}]",
                ", \"tools\": [{}]",
                "tools: this server does not call tools",
            ),
            ("[{\"role\": \"user\", \"content\": \"a\"}]", ", \"top_logprobs\": 2", "top_logprobs: expected only"),
            (
                "[{\"role\": \"user\", \"content\": \"a\"}]",
                ", \"response_format\": {\"type\": \"json_object\"}",
                "response_format",
            ),
        ] {
            let body = format!("{{\"model\": \"m\", \"messages\": {messages}{more}}}");
            refused(Chat::parse(body.as_bytes()), wanted);
        }
    }
}
