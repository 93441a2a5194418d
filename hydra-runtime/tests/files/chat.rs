//! The loss masks of conversations are those of Hugging Face's transformers (5.24: `apply_chat_template` with
//! `return_assistant_tokens_mask`).

use hydra_runtime::chat::{ChatTemplate, Message};
use hydra_runtime::checkpoint::Checkpoint;
use std::path::Path;

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
