//! Text after a prompt: token by token, or whole with a callback.

use crate::adapter::{Attached, hydra_adapter};
use crate::arguments::{Out, c_text, optional, slice, slice_mut, text};
use crate::error::{Result, door, hydra_status, invalid};
use crate::handle::{self, Object, Table, exclusive};
use crate::model::hydra_model;
use hydra_runtime::chat::Message;
use hydra_runtime::generate::{Finish, Generator, Prompt, Sampling};
use hydra_runtime::model::Model;
use std::ffi::{c_char, c_void};
use std::sync::Mutex;

/// A sequence that grows token by token, with its key-value cache. 0 is no generator.
pub type hydra_generator = u64;

struct Growing {
    generator: Mutex<Generator>,
    vocab: usize,
}

impl Object for Growing {
    const KIND: usize = 3;
    fn table() -> &'static Table<Self> {
        static TABLE: Table<Growing> = Table::new();
        &TABLE
    }
}

/// Makes an empty sequence with room for `max_tokens` tokens. `adapter` may be 0, for none. Any thread may call it. The
/// caller owns `generator` and frees it with `hydra_generator_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hydra_generator_new(
    model: hydra_model,
    adapter: hydra_adapter,
    max_tokens: usize,
    generator: *mut hydra_generator,
) -> hydra_status {
    // SAFETY: the caller's word.
    door(|| unsafe {
        let (model, adapter) = (handle::get::<Model>(model)?, handle::get_optional::<Attached>(adapter)?);
        let out = Out::new("generator", generator)?;
        let attached = adapter.as_ref().map(|adapter| &adapter.attached);
        let generator = Mutex::new(Generator::attached(&model, attached, max_tokens)?);
        out.set(handle::insert(Growing { generator, vocab: model.config().vocab })?);
        Ok(())
    })
}

/// Appends `count` tokens to the sequence, at least one, and writes the logits of what may follow to `logits`.
///
/// `logits_len` is the vocabulary's size, or 0 if the logits aren't needed. After an error nothing has been appended. Use a
/// generator from one thread at a time; a second call at the same time returns HYDRA_STATUS_BUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hydra_generator_feed(
    generator: hydra_generator,
    tokens: *const u32,
    count: usize,
    logits: *mut f32,
    logits_len: usize,
) -> hydra_status {
    // SAFETY: the caller's word, for both.
    door(|| unsafe {
        let (growing, tokens) = (handle::get::<Growing>(generator)?, slice("tokens", tokens, count)?);
        if logits_len != 0 && logits_len != growing.vocab {
            return Err(invalid(format!("logits: expected room for {} or 0, found {logits_len}", growing.vocab)));
        }
        let out = slice_mut("logits", logits, logits_len)?;
        let mut generator = exclusive("generator", &growing.generator)?;
        let logits = generator.feed(tokens)?;
        out.copy_from_slice(&logits[..logits_len]);
        Ok(())
    })
}

/// Writes the number of tokens that have been fed to `len`. Threads as `hydra_generator_feed`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hydra_generator_len(generator: hydra_generator, len: *mut usize) -> hydra_status {
    // SAFETY: the caller's word.
    door(|| unsafe {
        let (growing, out) = (handle::get::<Growing>(generator)?, Out::new("len", len)?);
        out.set(exclusive("generator", &growing.generator)?.len());
        Ok(())
    })
}

/// Forgets all tokens from `len` on. Threads as `hydra_generator_feed`.
#[unsafe(no_mangle)]
pub extern "C" fn hydra_generator_truncate(generator: hydra_generator, len: usize) -> hydra_status {
    door(|| {
        let growing = handle::get::<Growing>(generator)?;
        exclusive("generator", &growing.generator)?.truncate(len);
        Ok(())
    })
}

/// Frees a generator. 0 is allowed. Any thread may call it; memory in use by a call is given back when that call ends.
#[unsafe(no_mangle)]
pub extern "C" fn hydra_generator_free(generator: hydra_generator) -> hydra_status {
    door(|| handle::remove::<Growing>(generator))
}

/// How to generate.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct hydra_generate_options {
    /// The adapter, which is attached to the model; 0 for none.
    pub adapter: hydra_adapter,
    /// The most tokens to write; the model's context limits it, too.
    pub max_tokens: usize,
    /// Draws from softmax(logits / temperature); 0 takes the likeliest token each time.
    pub temperature: f32,
    /// Draws from this many of the likeliest tokens, and from others as likely as the last of them; 0 draws from all.
    pub top_k: usize,
    /// Draws from the likeliest of these that together have this probability, above 0 and at most 1.
    pub top_p: f32,
    /// Draws from those of these that have at least this share of the likeliest one's probability, from 0 to 1.
    pub min_p: f32,
    /// Divides positive logits of tokens in the prompt and the text, and multiplies negative ones; above 0, 1 for no penalty.
    pub repetition_penalty: f32,
    /// Taken from the logit of each token in the text; 0 for no penalty.
    pub presence_penalty: f32,
    /// The same, for each time that the text has it.
    pub frequency_penalty: f32,
    /// The same seed draws the same text.
    pub seed: u64,
    /// `stop_count` texts; the text ends before the first that appears. Null without any.
    pub stop: *const *const c_char,
    /// Number of `stop` texts.
    pub stop_count: usize,
}

impl hydra_generate_options {
    fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            seed: self.seed,
        }
    }
}

/// Up to 256 tokens, each the likeliest, without adapter and stop texts. Any thread may call it.
#[unsafe(no_mangle)]
pub extern "C" fn hydra_generate_options_default() -> hydra_generate_options {
    let Sampling { temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, seed } =
        Sampling::default();
    hydra_generate_options {
        adapter: 0,
        max_tokens: 256,
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        seed,
        stop: std::ptr::null(),
        stop_count: 0,
    }
}

/// Takes a piece of the text as it is generated: `len` bytes of whole UTF-8 characters, and a zero byte after them, which
/// are valid during the call. `user` is what the caller of hydra_generate gave. Returns 0 to go on; anything else ends the
/// text. It must not throw or jump out.
pub type hydra_text_callback = Option<unsafe extern "C" fn(text: *const c_char, len: usize, user: *mut c_void) -> i32>;

/// Why a text ended.
#[repr(i32)]
#[derive(Clone, Copy)]
pub enum hydra_finish {
    /// The model ended it.
    EndOfText = 0,
    /// A stop text appeared.
    Stop = 1,
    /// It has as many tokens as were asked for.
    MaxTokens = 2,
    /// The model's context is full.
    Context = 3,
    /// The callback ended it.
    Callback = 4,
}

/// What came of a generation.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct hydra_generation {
    /// Tokens that were drawn, without the one that ended the text.
    pub tokens: usize,
    /// A hydra_finish.
    pub finish: i32,
}

/// A turn of a conversation. Both texts end with a zero byte.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct hydra_message {
    /// "system", "user", "assistant", or what else the model's template knows.
    pub role: *const c_char,
    /// The text.
    pub content: *const c_char,
}

/// What hydra_generate and hydra_chat share.
struct Request {
    model: hydra_model,
    options: *const hydra_generate_options,
    callback: hydra_text_callback,
    user: *mut c_void,
    result: *mut hydra_generation,
}

impl Request {
    unsafe fn run(&self, prompt: Prompt) -> Result<()> {
        let model = handle::get::<Model>(self.model)?;
        // SAFETY: the caller's word, for both.
        let (options, result) = unsafe { (optional("options", self.options)?, Out::optional("result", self.result)?) };
        let options = options.copied().unwrap_or_else(|| hydra_generate_options_default());
        let adapter = handle::get_optional::<Attached>(options.adapter)?;
        let callback = self.callback.ok_or_else(|| invalid("callback is null"))?;
        let mut generate = model.generate(prompt).max_tokens(options.max_tokens).sampling(options.sampling());
        if let Some(adapter) = &adapter {
            generate = generate.adapter(&adapter.attached);
        }
        // SAFETY: the caller's word, for the array and each of its texts.
        for &stop in unsafe { slice("stop", options.stop, options.stop_count)? } {
            // SAFETY: the same.
            generate = generate.stop(unsafe { c_text("a stop text", stop)? });
        }
        let mut generated = generate.stream()?;
        let mut finish = None;
        for piece in generated.by_ref() {
            let piece = piece?;
            let (len, mut bytes) = (piece.len(), piece.into_bytes());
            bytes.push(0);
            // SAFETY: `bytes` are `len` and a zero; the callback is the caller's word.
            if unsafe { callback(bytes.as_ptr().cast::<c_char>(), len, self.user) } != 0 {
                finish = Some(hydra_finish::Callback);
                break;
            }
        }
        let finish = finish.unwrap_or(match generated.finish() {
            Some(Finish::EndOfText) | None => hydra_finish::EndOfText,
            Some(Finish::Stop) => hydra_finish::Stop,
            Some(Finish::MaxTokens) => hydra_finish::MaxTokens,
            Some(Finish::Context) => hydra_finish::Context,
        });
        if let Some(result) = result {
            result.set(hydra_generation { tokens: generated.tokens().len(), finish: finish as i32 });
        }
        Ok(())
    }
}

/// Continues a prompt of `prompt_len` bytes, UTF-8, and hands the text to `callback` as it is generated.
///
/// `options` may be null, for the defaults, and so may `result`. After an error `callback` may have had some of the text.
/// Any thread may call it, and several at the same time with one model and one adapter; `callback` is called from the same
/// thread, and may call other functions of this library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hydra_generate(
    model: hydra_model,
    prompt: *const c_char,
    prompt_len: usize,
    options: *const hydra_generate_options,
    callback: hydra_text_callback,
    user: *mut c_void,
    result: *mut hydra_generation,
) -> hydra_status {
    // SAFETY: the caller's word, for all.
    door(|| unsafe {
        let prompt = Prompt::Text(text("prompt", prompt, prompt_len)?.into());
        Request { model, options, callback, user, result }.run(prompt)
    })
}

/// Writes the assistant's turn after `count` messages, by the model's chat template. Otherwise as `hydra_generate`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hydra_chat(
    model: hydra_model,
    messages: *const hydra_message,
    count: usize,
    options: *const hydra_generate_options,
    callback: hydra_text_callback,
    user: *mut c_void,
    result: *mut hydra_generation,
) -> hydra_status {
    // SAFETY: the caller's word, for all.
    door(|| unsafe {
        let read = |message: &hydra_message| -> Result<Message> {
            let (role, content) = (c_text("a role", message.role)?, c_text("a message", message.content)?);
            Ok(Message { role: role.into(), content: content.into() })
        };
        let messages = slice("messages", messages, count)?.iter().map(read).collect::<Result<_>>()?;
        Request { model, options, callback, user, result }.run(Prompt::Chat(messages))
    })
}
