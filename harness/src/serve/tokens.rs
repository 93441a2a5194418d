//! The text and the bytes of single tokens, as log-probabilities show them.

use hydra_runtime::Result;
use hydra_runtime::tokenizer::Tokenizer;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// One token for itself.
#[derive(Debug, PartialEq)]
pub struct TokenText {
    /// Its text; of one that is only a part of a character, `bytes:\xe6\xbc`, as OpenAI's completions show it.
    pub text: String,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// The tokens of a vocabulary, each decoded when it is first asked for.
pub struct TokenTexts {
    tokenizer: Tokenizer,
    /// A token, and its text, in whose context others are decoded: some decoders drop a space at the beginning of a text.
    context: Option<(u32, String)>,
    known: Mutex<HashMap<u32, Arc<TokenText>>>,
}

impl TokenTexts {
    /// Those of a tokenizer.
    pub fn new(tokenizer: Tokenizer) -> Result<Self> {
        let first = tokenizer.encode("a")?.first().copied();
        let context = first.map(|id| tokenizer.decode(&[id]).map(|text| (id, text))).transpose()?;
        Ok(Self { tokenizer, context, known: Mutex::default() })
    }

    /// One of them. Ids that there are not have no text.
    pub fn get(&self, id: u32) -> Result<Arc<TokenText>> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(text) = known.get(&id) {
            return Ok(text.clone());
        }
        let text = Arc::new(self.decode(id)?);
        known.insert(id, text.clone());
        Ok(text)
    }

    fn decode(&self, id: u32) -> Result<TokenText> {
        let plain = match &self.context {
            Some((before, text)) => {
                let both = self.tokenizer.decode(&[*before, id])?;
                both.strip_prefix(text.as_str()).map_or_else(|| both.clone(), str::to_owned)
            }
            None => self.tokenizer.decode(&[id])?,
        };
        let own = self.tokenizer.token(id).unwrap_or_default();
        let text = match plain.as_str() {
            // A special token is decoded to nothing.
            "" => own,
            text if text.contains('\u{FFFD}') => match bytes_of(&own) {
                Some(bytes) => {
                    let escaped: String = bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect();
                    return Ok(TokenText { text: format!("bytes:{escaped}"), bytes });
                }
                None => plain,
            },
            _ => plain,
        };
        Ok(TokenText { bytes: text.clone().into_bytes(), text })
    }
}

/// The bytes of a vocabulary's entry that is not whole characters: "<0xE6>" of SentencePiece, or GPT-2's characters for bytes.
fn bytes_of(entry: &str) -> Option<Vec<u8>> {
    if let Some(hex) = entry.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>')) {
        return u8::from_str_radix(hex, 16).ok().map(|byte| vec![byte]);
    }
    entry.chars().map(gpt2_byte).collect()
}

/// The byte that a character of GPT-2's vocabulary stands for: printable characters of Latin-1 for themselves, those from U+0100
/// on for the other bytes in their order.
fn gpt2_byte(c: char) -> Option<u8> {
    let itself = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    match u32::from(c).checked_sub(0x100) {
        None => u8::try_from(u32::from(c)).ok().filter(itself),
        Some(index) => (0..=u8::MAX).filter(|byte| !itself(byte)).nth(index as usize),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hydra_runtime::checkpoint::Checkpoint;
    use std::path::Path;

    #[test]
    fn characters_that_stand_for_bytes() {
        // GPT-2's table: "Ġ" is the space, "Ċ" the line feed.
        assert_eq!(bytes_of("aĠĊ"), Some(b"a \n".to_vec()));
        assert_eq!(bytes_of("æ¼¢"), Some("漢".as_bytes().to_vec()));
        assert_eq!(bytes_of("<0xE6>"), Some(vec![0xE6]));
        assert_eq!(bytes_of("漢"), None);
        let all: std::collections::BTreeSet<u8> = (0..0x144).filter_map(char::from_u32).filter_map(gpt2_byte).collect();
        assert_eq!(all.len(), 256);
    }

    #[test]
    fn tokens_have_their_text() {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/model");
        let tokenizer = Checkpoint::open(model).unwrap().tokenizer().unwrap();
        let texts = TokenTexts::new(tokenizer.clone()).unwrap();
        let sentence = "Name three uses of a 漢 hydra.";
        let ids = tokenizer.encode(sentence).unwrap();
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| texts.get(id).unwrap().bytes.clone()).collect();
        assert_eq!(String::from_utf8(bytes).unwrap(), sentence);
        assert!(ids.iter().any(|&id| texts.get(id).unwrap().text.starts_with("bytes:\\x")), "a character in parts");
        assert_eq!(texts.get(1).unwrap().text, "</s>");
        assert_eq!(texts.get(u32::MAX).unwrap().text, "");
    }
}
