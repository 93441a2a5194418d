//! Text to token ids and back: `tokenizer.json` of a Hugging Face folder, or the vocabulary inside a GGUF file, which
//! `tokenizer/bpe.rs` and `tokenizer/spm.rs` turn into the same kind of pipeline.

pub(crate) mod bpe;
mod door;
pub(crate) mod limits;
pub(crate) mod spm;

pub(crate) use door::guarded;

use crate::config::Config;
use crate::error::printable;
use crate::files::Files;
use crate::{Error, Result};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use tokenizers::processors::template::TemplateProcessing;

/// Its name in a Hugging Face folder.
pub(crate) const FILE: &str = "tokenizer.json";
const OPTIONS: &str = "tokenizer_config.json";
const SPECIAL: &str = "special_tokens_map.json";
const TEMPLATE: &str = "chat_template.jinja";

/// A model's tokenizer. Clones share it.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    vocab_size: usize,
    special: Special,
    /// The texts of the special tokens that have a name, for chat templates.
    named: Arc<NamedTokens>,
    chat_template: Option<String>,
    /// Rows of the model's embedding. A vocabulary may have more entries: only those that a text needs are missing.
    rows: usize,
}

/// A special token's text by its name: "pad_token".
pub(crate) type NamedTokens = BTreeMap<String, String>;

/// The tokens that begin and end a text, as far as there are any.
#[derive(Clone, Copy, Default)]
pub(crate) struct Special {
    /// What the tokenizer itself begins a text with.
    pub bos_to_add: Option<u32>,
    /// What a chat template may begin a text with: the same, or one that the tokenizer leaves to the template.
    pub bos: Option<u32>,
    pub eos: Option<u32>,
}

impl Tokenizer {
    /// Around a pipeline.
    pub(crate) fn new(
        inner: tokenizers::Tokenizer,
        special: Special,
        mut named: NamedTokens,
        chat_template: Option<String>,
    ) -> Self {
        let vocab_size = inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        for (name, id) in [("bos_token", special.bos), ("eos_token", special.eos)] {
            if let Some(text) = id.and_then(|id| inner.id_to_token(id)) {
                named.insert(name.into(), text);
            }
        }
        let (inner, named) = (Arc::new(inner), Arc::new(named));
        Self { inner, vocab_size, special, named, chat_template, rows: usize::MAX }
    }

    /// For a model whose embedding has so many rows. Fails if the tokenizer has no tokens.
    pub(crate) fn with_rows(self, rows: usize) -> Result<Self> {
        match self.vocab_size {
            0 => Err(Error::Tokenizer("doesn't fit the model: it has no tokens".into())),
            _ => Ok(Self { rows, ..self }),
        }
    }

    /// Reads `tokenizer.json`, and `tokenizer_config.json`, `special_tokens_map.json` and `chat_template.jinja` if they are there. The end token is
    /// the tokenizer's own, else the model's.
    pub(crate) fn read(files: &Files, config: &Config) -> Result<Self> {
        let path = files.name(FILE);
        if !files.has(FILE) && files.has("tokenizer.model") {
            let how = "AutoTokenizer.from_pretrained(..).save_pretrained(..) writes it";
            let message = format!("not there, and tokenizer.model alone isn't read: {how}");
            return Err(Error::Format { path, offset: None, message });
        }
        let bytes = files.read(FILE)?;
        let invalid = |why: &dyn std::fmt::Display| {
            let message = format!("not a tokenizer: {why}");
            Error::Format { path: path.clone(), offset: None, message }
        };
        let pipeline: limits::Pipeline = serde_json::from_slice(&bytes).map_err(|e| invalid(&e))?;
        pipeline.check().map_err(|why| invalid(&why))?;
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes).map_err(|e| invalid(&e))?;
        limits::check_space(&inner).map_err(|why| invalid(&why))?;
        // Both would change what a text means; a length is the caller's to choose.
        inner.with_padding(None).with_truncation(None).map_err(|e| invalid(&e))?;
        let (mut named, mut chat_template) = (NamedTokens::new(), None);
        let options = files.has(OPTIONS).then(|| files.object(OPTIONS)).transpose()?;
        let complete = options.as_ref().is_some_and(|options| options.get("added_tokens_decoder").is_some());
        let special = (files.has(SPECIAL) && !complete).then(|| files.object(SPECIAL)).transpose()?;
        // As in transformers, the map counts before the options, but not at all beside a list of added tokens.
        for options in options.iter().chain(&special) {
            named.extend(named_tokens(&options.map));
            chat_template = options.get("chat_template").and_then(template).or(chat_template);
        }
        if files.has(TEMPLATE) {
            let text = String::from_utf8(files.read(TEMPLATE)?.into());
            let text = text.map_err(|_| Error::Format {
                path: files.name(TEMPLATE),
                offset: None,
                message: "not UTF-8".into(),
            });
            chat_template = Some(text?);
        }
        let bos_to_add = leading_token(&inner)?;
        let token = |name: &str| inner.token_to_id(named.get(name)?);
        let (bos, eos) = (token("bos_token").or(bos_to_add), token("eos_token").or(config.eos.first().copied()));
        Ok(Self::new(inner, Special { bos_to_add, bos, eos }, named, chat_template))
    }

    /// Writes `tokenizer.json` and `tokenizer_config.json`, from which [`Tokenizer::read`] and Hugging Face's
    /// transformers make the same tokenizer; `config` is the model's.
    pub(crate) fn save(&self, folder: &Path, config: &Config) -> Result<()> {
        let mut inner = tokenizers::Tokenizer::clone(&self.inner);
        let text = |id: Option<u32>| id.and_then(|id| self.token(id));
        let Special { bos_to_add, bos, eos } = self.special;
        if let Some((id, bos)) = bos_to_add.zip(text(bos_to_add)) {
            let build = || {
                let special = vec![(bos.clone(), id)];
                let (single, pair) = (format!("{bos} $A"), format!("{bos} $A {bos}:1 $B:1"));
                let mut builder = TemplateProcessing::builder();
                builder.try_single(single)?.try_pair(pair)?.special_tokens(special).build().map_err(|e| e.to_string())
            };
            let built = guarded(|| build().map_err(|e: String| Error::Tokenizer(e.replace('\n', " "))))?;
            inner.with_post_processor(Some(built));
        }
        let mut options = json!({
            "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": self.chat_template,
            "model_max_length": config.context, "clean_up_tokenization_spaces": false,
        });
        self.named.iter().for_each(|(name, text)| options[name] = json!(text));
        (options["bos_token"], options["eos_token"]) = (json!(text(bos.or(config.bos))), json!(text(eos)));
        let tokenizer = guarded(|| inner.to_string(true).map_err(refused))?;
        let files = [(FILE, tokenizer), (OPTIONS, format!("{options:#}\n"))];
        for (name, text) in files {
            let path = folder.join(name);
            std::fs::write(&path, text).map_err(|source| Error::Io { path, source })?;
        }
        Ok(())
    }

    /// The pipeline in `tokenizer.json`'s form.
    pub(crate) fn to_json(&self) -> Result<Value> {
        let text = guarded(|| self.inner.to_string(false).map_err(refused))?;
        serde_json::from_str(&text).map_err(|error| Error::Tokenizer(error.to_string()))
    }

    /// The ids of a text. No special token is added; special tokens written in the text are recognised.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let ids = guarded(|| Ok(self.inner.encode_fast(text, false).map_err(refused)?.get_ids().to_vec()))?;
        ids.iter().try_for_each(|&id| self.has_row(id))?;
        Ok(ids)
    }

    /// Fails if the model's embedding has no row for the token.
    fn has_row(&self, id: u32) -> Result<()> {
        if (id as usize) < self.rows {
            return Ok(());
        }
        let token = printable(&self.token(id).unwrap_or_default());
        let message = format!("token {id}, \"{token}\", is beyond the model's embedding of {} rows", self.rows);
        Err(Error::Tokenizer(message))
    }

    /// The ids of a text as [`Tokenizer::encode`] gives them, each with the bytes of the text that it stands for.
    pub fn encode_with_offsets(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>> {
        guarded(|| {
            let encoding = self.inner.encode(text, false).map_err(refused)?;
            let places = encoding.get_offsets().iter().map(|&(start, end)| start..end);
            encoding.get_ids().iter().try_for_each(|&id| self.has_row(id))?;
            Ok(encoding.get_ids().iter().copied().zip(places).collect())
        })
    }

    /// The text of ids, without special tokens and ids that there are not.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        guarded(|| self.inner.decode(ids, true).map_err(refused))
    }

    /// The ids of a text that begins a sequence: behind the beginning-of-text token if the tokenizer adds one and the text does not
    /// begin with it.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        let ids = self.encode(text)?;
        let bos = self.special.bos_to_add.filter(|bos| ids.first() != Some(bos));
        bos.map_or(Ok(()), |bos| self.has_row(bos))?;
        Ok(bos.into_iter().chain(ids).collect())
    }

    /// Decodes ids one at a time, as they are generated: those of a text from its beginning, such as an answer.
    pub fn stream(&self) -> TextStream {
        self.stream_after(&[])
    }

    /// The same for a text that continues the one of `before`. It may begin with a space that [`Tokenizer::stream`] leaves out, as
    /// SentencePiece's decoder does at the beginning of a text.
    pub fn stream_after(&self, before: &[u32]) -> TextStream {
        let ids = before[before.len().saturating_sub(MAX_PENDING)..].to_vec();
        TextStream { tokenizer: self.clone(), emitted: ids.len(), ids }
    }

    /// The token with which the tokenizer itself begins a text, if it does.
    pub fn bos_to_add(&self) -> Option<u32> {
        self.special.bos_to_add
    }

    /// The token that begins a text, which the tokenizer may leave to the chat template.
    pub fn bos(&self) -> Option<u32> {
        self.special.bos
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<u32> {
        self.special.eos
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The id of a token's exact text.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The text of one token as the vocabulary has it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The model's chat template, in Jinja.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// The texts of the special tokens that have a name: what a chat template knows as `pad_token`, for one.
    pub(crate) fn named_tokens(&self) -> &NamedTokens {
        &self.named
    }
}

/// An error of the tokenizers crate, on one line.
pub(crate) fn refused(error: tokenizers::Error) -> Error {
    Error::Tokenizer(error.to_string().replace('\n', " "))
}

/// A template is a string, or a list of named ones of which "default" is taken.
fn template(value: &Value) -> Option<String> {
    let named = |list: &Vec<Value>| {
        let default = list.iter().find(|one| one["name"] == "default")?;
        default["template"].as_str().map(str::to_owned)
    };
    value.as_str().map(str::to_owned).or_else(|| value.as_array().and_then(named))
}

/// The special tokens that a file names, each as its text or as an object with it. Those of one model alone may be in an object
/// of their own.
fn named_tokens(options: &Map<String, Value>) -> NamedTokens {
    let text = |token: &Value| token.as_str().or_else(|| token.get("content")?.as_str()).map(str::to_owned);
    let own = ["extra_special_tokens", "model_specific_special_tokens"].into_iter();
    let own = own.filter_map(|key| options.get(key)?.as_object()).flatten();
    let named = options.iter().filter(|(name, _)| name.ends_with("_token")).chain(own);
    named.filter_map(|(name, token)| Some((name.clone(), text(token)?))).collect()
}

/// What the post-processor puts before a text.
fn leading_token(inner: &tokenizers::Tokenizer) -> Result<Option<u32>> {
    let ids = |text, add| Ok::<_, Error>(inner.encode_fast(text, add).map_err(refused)?.get_ids().to_vec());
    // A small vocabulary may lack some of these.
    for text in ["a", "0", " ", "e", "\n", "A"] {
        let (with, without) = (ids(text, true)?, ids(text, false)?);
        if without.is_empty() {
            continue;
        }
        let leads = with.len() > without.len() && !with.starts_with(&without);
        return Ok(if leads { with.first().copied() } else { None });
    }
    Ok(None)
}

/// Text as it is generated: characters whose bytes are spread over several tokens come out whole.
pub struct TextStream {
    tokenizer: Tokenizer,
    /// The last tokens that gave text (what follows is decoded in their context), then the pending ones.
    ids: Vec<u32>,
    /// How many of `ids` have given their text.
    emitted: usize,
}

/// A character has at most four bytes, so more pending tokens than this are not one.
const MAX_PENDING: usize = 8;

impl TextStream {
    /// Takes a token; returns the text that it completes: often the token's own, sometimes none.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = self.pending()?;
        if text.is_empty() && self.ids.len() - self.emitted > MAX_PENDING {
            // Special tokens have no text: however many there are, each is decoded a few times.
            self.ids.remove(self.emitted);
        }
        if text.is_empty() || (text.ends_with('\u{FFFD}') && self.ids.len() - self.emitted < MAX_PENDING) {
            return Ok(String::new());
        }
        self.ids.drain(..self.emitted);
        self.emitted = self.ids.len();
        Ok(text)
    }

    /// The rest, even if it is only the beginning of a character.
    pub fn finish(self) -> Result<String> {
        self.pending()
    }

    fn pending(&self) -> Result<String> {
        let before = self.tokenizer.decode(&self.ids[..self.emitted])?;
        let now = self.tokenizer.decode(&self.ids)?;
        match now.strip_prefix(&before) {
            Some(text) => Ok(text.into()),
            // Bytes that are no character can turn those before them, which were one, into replacement characters.
            None => self.tokenizer.decode(&self.ids[self.emitted..]),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::checkpoint::Checkpoint;
    use std::path::Path;

    #[test]
    fn tokens_without_text_do_not_pile_up() {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../harness/assets/model");
        let tokenizer = Checkpoint::open(model).unwrap().tokenizer().unwrap();
        let (mut stream, special) = (tokenizer.stream(), tokenizer.eos().unwrap());
        let mut text = String::new();
        for id in tokenizer.encode("A 漢字").unwrap() {
            for _ in 0..100 {
                text += &stream.push(special).unwrap();
            }
            assert!(stream.ids.len() <= 2 * super::MAX_PENDING + 1, "{}", stream.ids.len());
            text += &stream.push(id).unwrap();
        }
        assert_eq!(text.replace('\u{FFFD}', ""), "A ");
    }
}
