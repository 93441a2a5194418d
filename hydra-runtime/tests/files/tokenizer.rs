//! Tokenizers: the SentencePiece and the byte-level kind inside GGUF, and tokenizer.json.

use crate::builder::{Gguf, config_json, model_tensors, write_folder};
use hydra_runtime::Result;
use hydra_runtime::chat::{ChatTemplate, Message};
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::tokenizer::Tokenizer;
use serde_json::json;
use tempfile::tempdir;

pub fn of_gguf(gguf: &Gguf) -> Result<Tokenizer> {
    let dir = tempdir().unwrap();
    let file = dir.path().join("m.gguf");
    std::fs::write(&file, gguf.bytes()).unwrap();
    Checkpoint::open(&file)?.tokenizer()
}

/// The tiny model with room for a larger vocabulary.
fn with_vocabulary(tokens: &[&str], kinds: &[i32]) -> Gguf {
    let mut gguf = Gguf::model();
    gguf.tensors.retain(|(name, ..)| name != "token_embd.weight" && name != "output.weight");
    let values = vec![0.5; tokens.len() * 8];
    gguf.tensor("token_embd.weight", &[tokens.len(), 8], &values);
    gguf.tensor("output.weight", &[tokens.len(), 8], &values);
    gguf.strings("tokenizer.ggml.tokens", tokens);
    gguf.i32s("tokenizer.ggml.token_type", kinds);
    gguf
}

/// 256 bytes, then some pieces; scores as SentencePiece gives them: the earlier, the higher.
pub fn sentencepiece() -> Gguf {
    let bytes: Vec<String> = (0..256).map(|b| format!("<0x{b:02X}>")).collect();
    let pieces =
        ["▁t", "he", "▁a", "in", "▁the", "▁▁", "in▁", "ab", "bc", "abc", "▁", "t", "h", "e", "a", "i", "n", "b", "c"];
    let mut tokens = vec!["<unk>", "<s>", "</s>"];
    tokens.extend(bytes.iter().map(String::as_str));
    tokens.extend(pieces);
    let mut kinds = vec![2, 3, 3];
    kinds.extend([6; 256]);
    kinds.extend([1; 19]);
    let mut gguf = with_vocabulary(&tokens, &kinds);
    let scores: Vec<f32> = (0..tokens.len()).map(|id| if id < 259 { 0.0 } else { 259.0 - id as f32 }).collect();
    gguf.f32s("tokenizer.ggml.scores", &scores);
    gguf.u32("tokenizer.ggml.bos_token_id", 1);
    gguf.u32("tokenizer.ggml.eos_token_id", 2);
    gguf.u32("tokenizer.ggml.unknown_token_id", 0);
    gguf
}

fn texts(tokenizer: &Tokenizer, text: &str) -> Vec<String> {
    tokenizer.encode(text).unwrap().into_iter().map(|id| tokenizer.token(id).unwrap()).collect()
}

#[test]
fn sentencepiece_joins_by_score() {
    let tokenizer = of_gguf(&sentencepiece()).unwrap();
    assert_eq!(texts(&tokenizer, "the"), ["▁the"]);
    assert_eq!(texts(&tokenizer, "the  hen"), ["▁the", "▁▁", "he", "n"]);
    // "▁a" has the best score, which leaves "bc"; after "▁t" it is "ab", and "abc" out of that.
    assert_eq!(texts(&tokenizer, "abc"), ["▁a", "bc"]);
    assert_eq!(texts(&tokenizer, "tabc"), ["▁t", "abc"]);
    assert_eq!(texts(&tokenizer, "é"), ["▁", "<0xC3>", "<0xA9>"]);
    assert_eq!(texts(&tokenizer, "in</s>the"), ["▁", "in", "</s>", "▁the"]);
    assert!(tokenizer.encode("").unwrap().is_empty());
    assert_eq!((tokenizer.bos_to_add(), tokenizer.eos()), (Some(1), Some(2)));
    for text in ["the  hen", "é a", " in", "abc\n"] {
        assert_eq!(tokenizer.decode(&tokenizer.encode(text).unwrap()).unwrap(), text);
    }
}

#[test]
fn sentencepiece_without_the_leading_space() {
    let mut gguf = sentencepiece();
    gguf.bool("tokenizer.ggml.add_space_prefix", false);
    gguf.bool("tokenizer.ggml.add_bos_token", false);
    let tokenizer = of_gguf(&gguf).unwrap();
    assert_eq!(texts(&tokenizer, "he the"), ["he", "▁the"]);
    assert_eq!(tokenizer.bos_to_add(), None);
    assert_eq!(tokenizer.decode(&tokenizer.encode("he the").unwrap()).unwrap(), "he the");
}

#[test]
fn text_streams_whole_characters() {
    let tokenizer = of_gguf(&sentencepiece()).unwrap();
    let ids = tokenizer.encode("the é hen").unwrap();
    let mut stream = tokenizer.stream();
    let mut pieces = Vec::new();
    for id in ids {
        let text = stream.push(id).unwrap();
        assert!(!text.contains('\u{FFFD}'), "{text:?}");
        pieces.push(text);
    }
    pieces.push(stream.finish().unwrap());
    assert_eq!(pieces.concat(), "the é hen");
    let mut cut = tokenizer.stream();
    assert_eq!(cut.push(tokenizer.token_id("<0xC3>").unwrap()).unwrap(), "");
    assert_eq!(cut.finish().unwrap(), "\u{FFFD}");
}

/// Bytes that are no character do not change the character before them.
#[test]
fn text_streams_a_character_once() {
    let tokenizer = of_gguf(&sentencepiece()).unwrap();
    let mut stream = tokenizer.stream();
    let bytes = ["<0xC3>", "<0xA9>", "<0xC3>"];
    let pieces = bytes.map(|byte| stream.push(tokenizer.token_id(byte).unwrap()).unwrap());
    assert_eq!((pieces.concat(), stream.finish().unwrap()), ("é".into(), "\u{FFFD}".into()));
}

#[test]
fn a_continuation_keeps_its_space() {
    let tokenizer = of_gguf(&sentencepiece()).unwrap();
    let ids = tokenizer.encode("he the a").unwrap();
    for (cut, want) in [(2, " the a"), (3, " a"), (0, "he the a")] {
        let mut stream = tokenizer.stream_after(&ids[..cut]);
        let text: String = ids[cut..].iter().map(|&id| stream.push(id).unwrap()).collect();
        assert_eq!(text + &stream.finish().unwrap(), want);
    }
    let mut answer = tokenizer.stream();
    assert_eq!(answer.push(tokenizer.token_id("▁the").unwrap()).unwrap(), "the");
}

pub fn byte_level(pre: &str) -> Gguf {
    let tokens = ["<|end|>", "a", "b", "Ġ", "1", "2", "Ġa", "ab", "12", "\u{10A}"];
    let mut gguf = with_vocabulary(&tokens, &[3, 1, 1, 1, 1, 1, 1, 1, 1, 1]);
    gguf.string("tokenizer.ggml.model", "gpt2");
    gguf.string("tokenizer.ggml.pre", pre);
    gguf.strings("tokenizer.ggml.merges", &["Ġ a", "a b", "1 2"]);
    gguf.u32("tokenizer.ggml.bos_token_id", 0);
    gguf.u32("tokenizer.ggml.eos_token_id", 0);
    gguf
}

#[test]
fn byte_level_words_are_cut_as_named() {
    let smollm = of_gguf(&byte_level("smollm")).unwrap();
    assert_eq!(texts(&smollm, "ab ab12"), ["ab", "Ġa", "b", "1", "2"]);
    assert_eq!(smollm.bos_to_add(), None);
    assert_eq!(smollm.decode(&smollm.encode("ab ab12\n").unwrap()).unwrap(), "ab ab12\n");
    let llama3 = of_gguf(&byte_level("llama-bpe")).unwrap();
    assert_eq!(texts(&llama3, "ab ab12<|end|>"), ["ab", "Ġa", "b", "12", "<|end|>"]);
    assert_eq!(llama3.bos_to_add(), Some(0));
    for pre in ["default", "gpt-2", "qwen2", "tekken"] {
        assert_eq!(texts(&of_gguf(&byte_level(pre)).unwrap(), "ab"), ["ab"], "{pre}");
    }
}

#[test]
fn bad_vocabularies_are_refused() {
    let complaint = |gguf: &Gguf| {
        let message = of_gguf(gguf).map(|_| ()).unwrap_err().to_string();
        assert!(!message.contains('\n'), "{message}");
        message
    };
    assert!(complaint(&byte_level("klingon")).contains("klingon"));
    let mut gguf = byte_level("smollm");
    gguf.strings("tokenizer.ggml.merges", &["nospace"]);
    assert!(complaint(&gguf).contains("nospace"));
    gguf.strings("tokenizer.ggml.merges", &["b b"]);
    assert!(complaint(&gguf).contains("bb"));
    let mut gguf = Gguf::model();
    gguf.strings("tokenizer.ggml.tokens", &["<unk>", "</s>", "a", "a", "b", "c"]);
    assert!(complaint(&gguf).contains("2 and 3"));
    let mut gguf = Gguf::model();
    gguf.strings("tokenizer.ggml.tokens", &["<unk>", "</s>", "a", "b", "c", "d", "e"]);
    gguf.i32s("tokenizer.ggml.token_type", &[1; 7]);
    gguf.f32s("tokenizer.ggml.scores", &[0.0; 7]);
    let beyond = of_gguf(&gguf).unwrap().encode("e").unwrap_err().to_string();
    assert!(beyond.contains("token 6, \"e\", is beyond the model's embedding of 6 rows"), "{beyond}");
    let mut gguf = Gguf::model();
    gguf.u32("tokenizer.ggml.eos_token_id", 6);
    assert!(complaint(&gguf).contains("eos_token_id"));
    let mut gguf = Gguf::model();
    gguf.f32s("tokenizer.ggml.scores", &[0.0; 5]);
    assert!(complaint(&gguf).contains("scores"));
}

#[test]
fn tokenizer_json() {
    let dir = tempdir().unwrap();
    write_folder(dir.path(), &config_json(), &model_tensors());
    let open = || Checkpoint::open(dir.path()).unwrap().tokenizer();
    assert!(open().map(|_| ()).unwrap_err().to_string().contains("tokenizer.json"));
    let mut file = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null, "decoder": {"type": "Fuse"},
        "added_tokens": [{"id": 0, "content": "<s>", "special": true, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false}],
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}}], "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
        "model": {"type": "BPE", "vocab": {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4}, "merges": ["a b"]}
    });
    let write = |file: &serde_json::Value| std::fs::write(dir.path().join("tokenizer.json"), file.to_string()).unwrap();
    write(&file);
    let tokenizer = open().unwrap();
    assert_eq!(tokenizer.encode("aba").unwrap(), [4, 2]);
    assert_eq!((tokenizer.bos_to_add(), tokenizer.eos(), tokenizer.vocab_size()), (Some(0), Some(1), 5));
    // A token that is left to the template is not added.
    let options = json!({"bos_token": "<s>", "eos_token": {"content": "b"}, "chat_template": [{"name": "default", "template": "T"}]});
    std::fs::write(dir.path().join("tokenizer_config.json"), options.to_string()).unwrap();
    file["post_processor"] = json!(null);
    write(&file);
    let tokenizer = open().unwrap();
    assert_eq!((tokenizer.bos_to_add(), tokenizer.eos(), tokenizer.chat_template()), (None, Some(3), Some("T")));
    let chat = ChatTemplate::new("{{ bos_token }}{{ messages[0].content }}", &tokenizer).unwrap();
    let prompt = chat.prompt(&[Message::user("a")]).unwrap();
    assert_eq!((tokenizer.bos(), &*prompt, tokenizer.encode_prompt(&prompt).unwrap()), (Some(0), "<s>a", vec![0, 2]));
    std::fs::write(dir.path().join("tokenizer_config.json"), r#"{"eos_token": "a"}"#).unwrap();
    let others = r#"{"bos_token": {"content": "<s>"}, "eos_token": "b"}"#;
    std::fs::write(dir.path().join("special_tokens_map.json"), others).unwrap();
    assert_eq!((open().unwrap().bos(), open().unwrap().eos()), (Some(0), Some(3)));
    // As in transformers, which don't read it beside a list of added tokens.
    let newer = r#"{"eos_token": "a", "added_tokens_decoder": {}}"#;
    std::fs::write(dir.path().join("tokenizer_config.json"), newer).unwrap();
    assert_eq!((open().unwrap().bos(), open().unwrap().eos()), (None, Some(2)));
    std::fs::remove_file(dir.path().join("tokenizer_config.json")).unwrap();
    assert_eq!(open().unwrap().eos(), Some(3));
    // Cut anywhere, and with a template whose token isn't declared.
    let whole = file.to_string();
    for cut in 0..whole.len() {
        std::fs::write(dir.path().join("tokenizer.json"), &whole[..cut]).unwrap();
        assert!(open().map(|_| ()).unwrap_err().to_string().contains("tokenizer.json"), "cut at {cut}");
    }
    let template = json!({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}], "pair": [],
        "special_tokens": {}});
    for processor in [template.clone(), json!({"type": "Sequence", "processors": [template]})] {
        file["post_processor"] = processor;
        write(&file);
        let said = open().map(|_| ()).unwrap_err().to_string();
        assert!(said.contains("tokenizer.json") && said.contains("<s>"), "{said}");
    }
}
