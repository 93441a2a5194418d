//! Tokenizers: the SentencePiece and the byte-level kind inside GGUF, and tokenizer.json.

use crate::builder::{Gguf, config_json, model_tensors, write_folder};
use hydra_runtime::Result;
use hydra_runtime::chat::{ChatTemplate, Message};
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::tokenizer::Tokenizer;
use serde_json::json;
use tempfile::tempdir;

fn of_gguf(gguf: &Gguf) -> Result<Tokenizer> {
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
    assert!(complaint(&gguf).contains("doesn't fit"));
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
    assert_eq!((open().unwrap().bos(), open().unwrap().eos()), (Some(0), Some(2)));
    std::fs::remove_file(dir.path().join("tokenizer_config.json")).unwrap();
    assert_eq!(open().unwrap().eos(), Some(3));
    file["model"]["vocab"]["ab"] = json!(6);
    write(&file);
    assert!(open().map(|_| ()).unwrap_err().to_string().contains("doesn't fit"));
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

/// A small tokenizer.json, changed.
fn changed(change: impl FnOnce(&mut serde_json::Value)) -> Result<Tokenizer> {
    let dir = tempdir().unwrap();
    write_folder(dir.path(), &config_json(), &model_tensors());
    let mut file = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null, "decoder": null,
        "added_tokens": [], "post_processor": null,
        "model": {"type": "BPE", "vocab": {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4}, "merges": ["a b"]}
    });
    change(&mut file);
    std::fs::write(dir.path().join("tokenizer.json"), file.to_string()).unwrap();
    Checkpoint::open(dir.path()).unwrap().tokenizer()
}

type Change<'a> = &'a dyn Fn(&mut serde_json::Value);

#[test]
fn where_the_tokenizers_crate_panics_there_is_an_error() {
    let said = |change: Change| {
        let tokenizer = changed(|file| change(file));
        let used = tokenizer.and_then(|tokenizer| tokenizer.decode(&tokenizer.encode("ab")?));
        let message = used.expect_err("an error").to_string();
        assert!(!message.contains('\n') && message.contains("tokenizer"), "{message}");
        message
    };
    let one = json!({"Sequence": {"id": "B", "type_id": 0}});
    let cases: [(&str, Change); 7] = [
        ("models/bpe", &|file| file["model"]["continuing_subword_prefix"] = json!("longer than b")),
        ("pre_tokenizers/fixed_length", &|file| file["pre_tokenizer"] = json!({"type": "FixedLength", "length": 0})),
        ("decoders/strip", &|file| {
            file["decoder"] = json!({"type": "Strip", "content": "a", "start": 0, "stop": 9});
            file["model"]["vocab"] = json!({"a": 0, "b": 1, "aa": 2});
            file["model"]["merges"] = json!([]);
        }),
        ("decoders", &|file| file["decoder"] = json!({"type": "Strip", "content": 1})),
        ("processors/template", &|file| {
            file["post_processor"] =
                json!({"type": "TemplateProcessing", "single": [one], "pair": [one], "special_tokens": {}});
        }),
        ("normalizers", &|file| file["normalizer"] = json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"})),
        ("normalizers/mod", &|file| {
            file["normalizer"] = json!({"type": "Replace", "pattern": {"Regex": "("}, "content": ""})
        }),
    ];
    for (place, change) in cases {
        let message = said(change);
        assert!(message.len() < 400, "{place}: {message}");
    }
    assert_eq!(changed(|_| ()).unwrap().encode("ab").unwrap(), [4]);
}

#[test]
fn pipelines_that_exhaust_memory_are_refused() {
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let double = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"});
    let a = json!({"Sequence": {"id": "A", "type_id": 0}});
    let template = json!({"type": "TemplateProcessing", "single": [a, a], "pair": [], "special_tokens": {}});
    let nested = (0..40).fold(bytes.clone(), |inner, _| json!({"type": "Sequence", "pretokenizers": [bytes, inner]}));
    let cases: [(&str, &str, serde_json::Value); 6] = [
        ("pre_tokenizer has 81 steps", "pre_tokenizer", nested),
        ("pre_tokenizer may", "pre_tokenizer", json!({"type": "Sequence", "pretokenizers": vec![bytes; 40]})),
        ("normalizer may", "normalizer", json!({"type": "Sequence", "normalizers": vec![double.clone(); 40]})),
        ("decoder may", "decoder", json!({"type": "Sequence", "decoders": vec![double.clone(); 40]})),
        ("post_processor may", "post_processor", json!({"type": "Sequence", "processors": vec![template; 40]})),
        ("normalizer has 101 steps", "normalizer", json!({"type": "Sequence", "normalizers": vec![double; 100]})),
    ];
    for (wanted, part, value) in cases {
        let message = changed(|file| file[part] = value).map(|_| ()).unwrap_err().to_string();
        assert!(message.contains(wanted), "{wanted}: {message}");
    }
}

/// The one line that a changed tokenizer.json is refused with.
fn refused(change: impl FnOnce(&mut serde_json::Value)) -> String {
    let message = changed(change).map(|_| ()).expect_err("an error").to_string();
    assert!(!message.contains('\n') && message.contains("tokenizer.json") && message.len() < 400, "{message}");
    message
}

#[test]
fn models_with_overlong_tokens_are_refused() {
    let unigram = |pieces: Vec<String>| {
        let pieces = pieces.into_iter().chain(["<s>".into(), "a".into()]).map(|piece| json!([piece, -1.0]));
        json!({"type": "Unigram", "unk_id": 0, "vocab": pieces.collect::<Vec<_>>()})
    };
    let long = "a".repeat(200_000);
    let word_piece = |most: u64, prefix: &str| {
        json!({"type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": prefix,
            "max_input_chars_per_word": most, "vocab": {"a": 0}})
    };
    let many = (0..33_000).map(|n| format!("{n:0>256}")).collect();
    let cases = [
        ("a token of 200000 bytes: expected at most 256", unigram(vec![long.clone()])),
        ("pieces of 8448004 bytes: expected at most 8388608", unigram(many)),
        ("a token of 200000 bytes", json!({"type": "BPE", "vocab": {&long: 0, "a": 1}, "merges": []})),
        ("a token of 200000 bytes", json!({"type": "WordLevel", "unk_token": "a", "vocab": {&long: 0, "a": 1}})),
        ("max_input_chars_per_word is 1000000000000000: expected at most 256", word_piece(1_000_000_000_000_000, "##")),
        ("continuing_subword_prefix of 200000 bytes", word_piece(100, &long)),
    ];
    for (wanted, model) in cases {
        let message = refused(|file| file["model"] = model);
        assert!(message.contains(wanted), "{wanted}: {message}");
    }
    for model in [unigram(vec!["a".repeat(256)]), word_piece(100, "##")] {
        assert!(changed(|file| file["model"] = model).unwrap().encode("a").unwrap().len() < 3);
    }
}

#[test]
fn added_tokens_that_take_too_long_are_refused() {
    let token = |id: usize, content: String| {
        json!({"id": 5 + id, "content": content, "special": true, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false})
    };
    let normalized = |mut token: serde_json::Value| {
        token["normalized"] = json!(true);
        token
    };
    let x = |length: usize| token(0, "x".repeat(length));
    let replace =
        |content: &str| json!({"type": "Replace", "pattern": {"String": "x"}, "content": content.repeat(1000)});
    let cases: [(&str, Change); 7] = [
        ("added token of 20000 bytes: expected at most 1000", &|file| file["added_tokens"] = json!([x(20_000)])),
        ("added token of 10000000 bytes", &|file| file["added_tokens"] = json!([x(10_000_000)])),
        ("100000 added_tokens: expected at most 70000", &|file| {
            file["added_tokens"] = (0..100_000).map(|id| token(id, format!("x{id}"))).collect();
        }),
        ("may have 5000000 bytes: expected at most 4194304", &|file| {
            file["added_tokens"] = (0..5000).map(|id| token(id, format!("{id:x>1000}"))).collect();
        }),
        // What counts is what the normalizer makes of them.
        ("as slow as one of 20000 bytes: expected at most 4096", &|file| {
            file["added_tokens"] = json!([normalized(x(20))]);
            file["normalizer"] = replace("x");
        }),
        ("\" \" is white space", &|file| {
            file["added_tokens"] = json!([token(0, " ".into())]);
            file["added_tokens"][0]["lstrip"] = json!(true);
        }),
        ("\"x\" is white space", &|file| {
            file["added_tokens"] = json!([normalized(x(1))]);
            file["added_tokens"][0]["rstrip"] = json!(true);
            file["normalizer"] = replace(" ");
        }),
    ];
    for (wanted, change) in cases {
        let message = refused(|file| change(file));
        assert!(message.contains(wanted), "{wanted}: {message}");
    }
    let mut gguf = Gguf::model();
    gguf.strings("tokenizer.ggml.tokens", &["<unk>", "</s>", "a", "b", "c", &"x".repeat(20_000)]);
    gguf.i32s("tokenizer.ggml.token_type", &[2, 3, 1, 1, 1, 3]);
    let message = of_gguf(&gguf).map(|_| ()).unwrap_err().to_string();
    assert!(message.contains("added token of 20000 bytes: expected at most 1000"), "{message}");
    let sounds = |file: &mut serde_json::Value| {
        file["added_tokens"] = (0..65_536).map(|id| token(id, format!("<|s_{id}|>"))).collect();
    };
    assert!(refused(sounds).contains("doesn't fit the model"));
}

#[test]
fn templates_with_too_many_special_tokens_are_refused() {
    let place = json!({"SpecialToken": {"id": "<s>", "type_id": 0}});
    let template = |places: usize, ids: usize, text: &str| {
        json!({"type": "TemplateProcessing", "single": vec![place.clone(); places], "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": vec![0; ids], "tokens": vec![text; ids]}}})
    };
    let sequence = json!({"type": "Sequence", "processors": vec![template(100, 10, "<s>"); 20]});
    let cases = [
        ("put in 70000000 bytes: expected at most 65536", template(10_000, 1000, "<s>")),
        ("put in 1000040 bytes", template(10, 1, &"s".repeat(100_000))),
        ("put in 140000 bytes", sequence),
    ];
    for (wanted, processor) in cases {
        let message = refused(|file| file["post_processor"] = processor);
        assert!(message.contains(wanted), "{wanted}: {message}");
    }
    assert!(changed(|file| file["post_processor"] = template(100, 10, "<s>")).is_ok());
}

#[test]
fn patterns_with_too_many_repetitions_are_refused() {
    let split = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    let replace = |kind: &str, pattern: &str| json!({"type": "Replace", "pattern": {kind: pattern}, "content": "a"});
    let repeated = "(?:((?=a)){1000}){1000}";
    let long = "a".repeat(5000);
    let cases = [
        ("pre_tokenizer has a pattern of 50", "pre_tokenizer", split("(?:(?:((?=a)){1000}){1000}){1000}")),
        ("pre_tokenizer has a pattern of 50", "pre_tokenizer", split(repeated)),
        ("normalizer has a pattern of 50", "normalizer", replace("Regex", repeated)),
        ("normalizer has a pattern of 5000 ", "normalizer", replace("String", &long)),
        ("decoder has a pattern of 5000 ", "decoder", replace("Regex", &long)),
        ("normalizer has a pattern of 1000000 ", "normalizer", replace("Regex", &"[{".repeat(500_000))),
    ];
    for (wanted, part, value) in cases {
        let message = refused(|file| file[part] = value);
        assert!(message.contains(wanted) && message.contains("expected at most 4096"), "{wanted}: {message}");
    }
    // Those of LLaMA 3 and of grouped digits.
    for pattern in [r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s+(?!\S)", r"\d{1,3}(?=(?:\d{3})*\b)"] {
        assert_eq!(changed(|file| file["pre_tokenizer"] = split(pattern)).unwrap().encode("ab").unwrap(), [4]);
    }
}
