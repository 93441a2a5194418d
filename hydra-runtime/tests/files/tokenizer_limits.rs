//! What a tokenizer.json may ask for, and what is refused.

use crate::builder::{Gguf, config_json, model_tensors, write_folder};
use crate::tokenizer::of_gguf;
use hydra_runtime::Result;
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::tokenizer::Tokenizer;
use serde_json::json;
use tempfile::tempdir;

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
    assert!(changed(sounds).unwrap().vocab_size() >= 65_536);
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
    let slow = r"(?:a+)+(?!b)|a";
    for part in ["pre_tokenizer", "normalizer", "decoder"] {
        let step = if part == "pre_tokenizer" { split(slow) } else { replace("Regex", slow) };
        let message = refused(|file| file[part] = step);
        assert!(message.contains(&format!("{part} has a pattern that may take too long, \"{slow}\"")), "{message}");
    }
    // Those of LLaMA 3 and of grouped digits.
    for pattern in [r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s+(?!\S)", r"\d{1,3}(?=(?:\d{3})*\b)"] {
        assert_eq!(changed(|file| file["pre_tokenizer"] = split(pattern)).unwrap().encode("ab").unwrap(), [4]);
    }
}

#[test]
fn a_tokenizer_is_a_regular_file_and_not_too_large() {
    let dir = tempdir().unwrap();
    write_folder(dir.path(), &config_json(), &model_tensors());
    let file = dir.path().join("tokenizer.json");
    let said = || Checkpoint::open(dir.path()).unwrap().tokenizer().map(|_| ()).unwrap_err().to_string();
    std::fs::File::create(&file).unwrap().set_len(300 << 20).unwrap();
    assert!(said().ends_with("tokenizer.json: 314572800 bytes: expected at most 268435456"), "{}", said());
    std::fs::remove_file(&file).unwrap();
    std::fs::create_dir(&file).unwrap();
    assert!(said().ends_with("tokenizer.json: not a regular file"), "{}", said());
    #[cfg(unix)]
    {
        std::fs::remove_dir(&file).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &file).unwrap();
        assert!(said().ends_with("tokenizer.json: not a regular file"), "{}", said());
    }
}

/// Checkpoints with a token more than their embedding has rows are common, of one that pads for example.
#[test]
fn tokens_beyond_the_embedding_are_refused_where_they_are_used() {
    let token = |(content, id): (&str, usize)| {
        json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false})
    };
    let added = |file: &mut serde_json::Value| {
        file["added_tokens"] = [("<last>", 5), ("<pad>", 6)].map(token).into_iter().collect();
    };
    let tokenizer = changed(added).unwrap();
    assert_eq!((tokenizer.vocab_size(), tokenizer.encode("ab<last>").unwrap()), (7, vec![4, 5]));
    let wanted = "tokenizer: token 6, \"<pad>\", is beyond the model's embedding of 6 rows";
    for error in [
        tokenizer.encode("a<pad>").map(drop),
        tokenizer.encode_prompt("<pad>").map(drop),
        tokenizer.encode_with_offsets("a<pad>").map(drop),
    ] {
        assert_eq!(error.unwrap_err().to_string(), wanted);
    }
    // So is one that the tokenizer itself puts before a text.
    let leading = |file: &mut serde_json::Value| {
        added(file);
        let place = json!({"SpecialToken": {"id": "<pad>", "type_id": 0}});
        file["post_processor"] = json!({"type": "TemplateProcessing", "single": [place, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [], "special_tokens": {"<pad>": {"id": "<pad>", "ids": [6], "tokens": ["<pad>"]}}});
    };
    let tokenizer = changed(leading).unwrap();
    assert_eq!(tokenizer.encode_prompt("a").unwrap_err().to_string(), wanted);
    assert_eq!(tokenizer.encode("a").unwrap(), [2]);
}
