//! Templates have the special tokens that Hugging Face's transformers (5.24) give them, and the loss masks of conversations are
//! theirs (`apply_chat_template` with `return_assistant_tokens_mask`).

use hydra_runtime::adapter::Adapter;
use hydra_runtime::backend::Format;
use hydra_runtime::chat::{ChatTemplate, Message};
use hydra_runtime::checkpoint::Checkpoint;
use hydra_runtime::merge::{self, GgufOptions, MergeGate};
use std::path::Path;
use tempfile::tempdir;

const MARKED: &str = "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}{{ 'Answer: ' }}\n    \
    {%- generation -%}\n    {{ message.content }}{{ eos_token }}\n    {%- endgeneration %}\n\n{% else %}\n\
    {{ message.role }}: {{ message.content }}\n{% endif %}{% endfor %}";

#[rustfmt::skip]
const TOKENS: [u32; 95] = [
    0, 84, 90, 338, 70, 78, 27, 222, 35, 70, 289, 260, 70, 71, 13, 222, 164, 122, 97, 163, 257, 247, 15, 200, 287, 83, 27, 222,
    387, 222, 18, 24, 297, 222, 19, 22, 15, 200, 34, 79, 84, 88, 70, 83, 27, 222, 42, 85, 362, 222, 21, 19, 129, 104, 15, 1, 200,
    287, 83, 27, 222, 34, 283, 222, 20, 32, 200, 34, 79, 84, 88, 70, 83, 27, 298, 79, 222, 21, 22, 13, 262, 79, 267, 77, 69, 222,
    79, 86, 78, 67, 70, 83, 15, 1, 200,
];

fn conversation() -> [Message; 5] {
    [
        Message::system("Be brief, 漢字."),
        Message::user("Add 17 and 25."),
        Message::assistant("It is 42é."),
        Message::user("And 3?"),
        Message::assistant("Then 45, an old number."),
    ]
}

#[test]
fn masks_are_those_of_transformers() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/hydra/model");
    let tokenizer = Checkpoint::open(&model).unwrap().tokenizer().unwrap();
    let masked = |template: &str| {
        // The golden tokenizer puts no BOS before a text, so that the template has to write it.
        let template = template.replace("{{ bos_token }}", "<s>");
        let chat = ChatTemplate::new(&template, &tokenizer).unwrap();
        chat.conversation(&conversation()).unwrap().tokens(&tokenizer).unwrap()
    };
    let found = masked(MARKED);
    assert_eq!(found.tokens, TOKENS);
    let learnt: Vec<usize> = (0..found.mask.len()).filter(|&i| found.mask[i]).collect();
    assert_eq!(learnt, (46..56).chain(74..94).collect::<Vec<_>>());
    // Without its marks, and with the prompt for an answer that the marked one lacks, they are found.
    let plain = MARKED.replace("{%- generation -%}", "{#- -#}").replace("{%- endgeneration %}", "{#- #}");
    let prompted = plain + "{% if add_generation_prompt %}Answer: {% endif %}";
    assert_eq!(masked(&prompted), found);
}

/// A folder's tokenizer files name tokens as text or as an object; those without a name are undefined.
#[test]
fn special_tokens_are_the_tokenizers() {
    let (golden, dir) = (Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/hydra/model"), tempdir().unwrap());
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(golden.join(name), dir.path().join(name)).unwrap();
    }
    let options = r##"{"bos_token": null, "eos_token": {"content": "</s>"}, "pad_token": "!", "unk_token": "#", "sep_token": null,
        "image_token": "$", "add_bos_token": true, "extra_special_tokens": {"video": "%"}}"##;
    std::fs::write(dir.path().join("tokenizer_config.json"), options).unwrap();
    let template = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}|{{ image_token }}|{{ video }}|\
        {{ sep_token is defined or add_bos_token is defined }}";
    let text = |folder: &Path| {
        let tokenizer = Checkpoint::open(folder).unwrap().tokenizer().unwrap();
        ChatTemplate::new(template, &tokenizer).unwrap().prompt(&conversation()).unwrap()
    };
    assert_eq!(text(dir.path()), "|</s>|!|#|$|%|False");
    assert_eq!(text(&golden), "|</s>|||||False");
    // A GGUF file keeps the two that llama.cpp has keys for.
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let adapter = Adapter::load(golden.join("../adapter"), checkpoint.config()).unwrap();
    let file = dir.path().join("m.gguf");
    merge::write_gguf(
        &checkpoint,
        &adapter,
        MergeGate::Uniform,
        &file,
        GgufOptions { format: Format::F32, description: None },
    )
    .unwrap();
    assert_eq!(text(&file), "<s>|</s>|!|#|||False");
}
