"""Writes the binary files in corpus/: a model of two layers of width 8 in both containers, adapters for it, trainer states, and
compressed records. Needs pyarrow and zstandard."""

import gzip
import io
import json
import pathlib
import struct

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

CORPUS = pathlib.Path(__file__).parent / "corpus"
CONFIG = {"model_type": "llama", "vocab_size": 6, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
          "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
          "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1}


def write(target, name, content):
    (CORPUS / target).mkdir(parents=True, exist_ok=True)
    (CORPUS / target / name).write_bytes(content)


def values(count, seed):
    return [((i * 37 + seed * 101) % 64 - 32) / 64 for i in range(count)]


def size(shape):
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def safetensors(tensors, metadata=None):
    header, data = ({"__metadata__": metadata} if metadata else {}), b""
    for seed, (name, shape) in enumerate(tensors):
        raw = struct.pack(f"<{size(shape)}f", *values(size(shape), seed))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def model():
    tensors = [("model.embed_tokens.weight", [6, 8]), ("model.norm.weight", [8]), ("lm_head.weight", [6, 8])]
    for layer in range(2):
        for name, shape in [("input_layernorm", [8]), ("post_attention_layernorm", [8]), ("self_attn.q_proj", [8, 8]),
                            ("self_attn.k_proj", [4, 8]), ("self_attn.v_proj", [4, 8]), ("self_attn.o_proj", [8, 8]),
                            ("mlp.gate_proj", [12, 8]), ("mlp.up_proj", [12, 8]), ("mlp.down_proj", [8, 12])]:
            tensors.append((f"model.layers.{layer}.{name}.weight", shape))
    return tensors


def folder(config, tensors, metadata=None):
    return json.dumps(config).encode() + b"\0" + safetensors(tensors, metadata)


write("safetensors", "tiny", folder(CONFIG, model()))
tied = [tensor for tensor in model() if tensor[0] != "model.embed_tokens.weight"]
write("safetensors", "tied", folder({**CONFIG, "tie_word_embeddings": True}, tied,
                                    {"model.embed_tokens.weight": "lm_head.weight", "format": "pt"}))
llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
write("safetensors", "llama3", folder({**CONFIG, "rope_theta": 500000.0, "rope_scaling": llama3}, model()))

# GGUF: types of values are 4 (u32), 5 (i32), 6 (f32), 7 (bool), 8 (string), 9 (array).


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value(kind, content):
    form = {4: "<I", 5: "<i", 6: "<f", 7: "<?"}
    if kind == 9:
        inner, items = content
        return struct.pack("<IQ", inner, len(items)) + b"".join(value(inner, item) for item in items)
    return text(content) if kind == 8 else struct.pack(form[kind], content)


def gguf(tokenizer):
    pairs = [("general.architecture", 8, "llama"), ("llama.block_count", 4, 2), ("llama.context_length", 4, 64),
             ("llama.embedding_length", 4, 8), ("llama.feed_forward_length", 4, 12),
             ("llama.attention.head_count", 4, 2), ("llama.attention.head_count_kv", 4, 1),
             ("llama.attention.layer_norm_rms_epsilon", 6, 1e-5), *tokenizer]
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
             "lm_head.weight": "output.weight"}
    parts = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
             "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    for tensor, _ in model():
        if tensor not in names:
            _, _, layer, *part, _ = tensor.split(".")
            names[tensor] = f"blk.{layer}.{parts['.'.join(part)]}.weight"
    return container(pairs, [(names[tensor], shape) for tensor, shape in model()])


def container(pairs, tensors):
    head, data = b"", b""
    for seed, (name, shape) in enumerate(tensors):
        data += b"\0" * (-len(data) % 32)
        head += text(name) + struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", n) for n in shape[::-1])
        head += struct.pack("<IQ", 0, len(data))
        data += struct.pack(f"<{size(shape)}f", *values(size(shape), seed))
    metadata = b"".join(text(key) + struct.pack("<I", kind) + value(kind, content) for key, kind, content in pairs)
    file = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + metadata + head
    return file + b"\0" * (-len(file) % 32) + data


spm = [("tokenizer.ggml.model", 8, "llama"), ("tokenizer.ggml.tokens", 9, (8, ["<unk>", "</s>", "▁", "a", "b", "▁a"])),
       ("tokenizer.ggml.scores", 9, (6, [0.0, 0.0, -1.0, -2.0, -3.0, -0.5])),
       ("tokenizer.ggml.token_type", 9, (5, [2, 3, 1, 1, 1, 1])), ("tokenizer.ggml.bos_token_id", 4, 0),
       ("tokenizer.ggml.eos_token_id", 4, 1), ("tokenizer.ggml.add_bos_token", 7, True),
       ("tokenizer.chat_template", 8, "{{ bos_token }}{% for m in messages %}{{ m.content | trim }}{% endfor %}")]
bpe = [("tokenizer.ggml.model", 8, "gpt2"), ("tokenizer.ggml.pre", 8, "llama-bpe"),
       ("tokenizer.ggml.tokens", 9, (8, ["<s>", "</s>", "Ġ", "a", "b", "ab"])),
       ("tokenizer.ggml.merges", 9, (8, ["a b"])), ("tokenizer.ggml.token_type", 9, (5, [3, 3, 1, 1, 1, 1]))]
write("gguf", "spm", gguf(spm))
write("gguf", "bpe", gguf(bpe))

pairs = [("general.architecture", 8, "llama"), ("general.type", 8, "adapter"), ("adapter.type", 8, "lora"),
         ("adapter.lora.alpha", 6, 4.0)]
tensors = [(f"blk.{layer}.attn_q.weight.lora_{part}", shape)
           for layer in range(2) for part, shape in [("a", [2, 8]), ("b", [8, 2])]]
write("gguf_lora", "q", container(pairs, tensors))
tensors = [(f"blk.{layer}.{name}.weight.lora_{part}", shape)
           for layer, name, r in [(0, "attn_q", 1), (1, "attn_output", 3)] for part, shape in [("a", [r, 8]), ("b", [8, r])]]
write("gguf_lora", "ranks", container(pairs, tensors))

PLACE = "base_model.model.model.layers.{}.self_attn.q_proj.{}.weight"
hydra = {"peft_type": "LORA", "method": "hydra", "r": 1, "lora_alpha": 2, "lora_nums": 2, "target_modules": ["q_proj"],
         "gate": "router", "task_type": "CAUSAL_LM", "bias": "none"}
parts = [("lora_A", [1, 8]), ("lora_B0", [8, 1]), ("lora_B1", [8, 1]), ("lora_route", [2, 8])]
write("adapter", "hydra", folder(hydra, [(PLACE.format(layer, part), shape) for layer in range(2) for part, shape in parts]))
lora = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
parts = [("lora_A", [2, 8]), ("lora_B", [8, 2])]
write("adapter", "lora", folder(lora, [(PLACE.format(layer, part), shape) for layer in range(2) for part, shape in parts],
                                {"format": "pt"}))

ranks = lora | {"target_modules": ".*\\.(q|o)_proj", "rank_pattern": {"^model.*q_proj": 1, "o_proj": 2}, "alpha_pattern": {"o_proj": 3},
                "exclude_modules": ["0.self_attn.o_proj"]}
write("adapter", "ranks", folder(ranks, [(PLACE.format(layer, part).replace("q_proj", name), shape)
                                         for layer, name, r in [(0, "q_proj", 1), (1, "q_proj", 1), (1, "o_proj", 2)]
                                         for part, shape in [("lora_A", [r, 8]), ("lora_B", [8, r])]]))

# For each of two layers: A and the router have 3 rows of 8 values, B 8 rows of 2.
state = [("params", [80]), ("exp_avg", [80]), ("exp_avg_sq", [80])]
write("trainer_state", "early", safetensors(state, {"steps": "3"}))

lines = "".join(json.dumps(record) + "\n" for record in [{"prompt": "a", "completion": "ab"}, {"prompt": "b", "completion": "a"}])
write("compressed", "gzip", gzip.compress(lines.encode(), mtime=0))
compressor = zstandard.ZstdCompressor(write_checksum=True)
write("compressed", "zstd", compressor.compress(lines.encode()) + b"\x50\x2a\x4d\x18\x01\0\0\0x" + compressor.compress(lines.encode()))


def parquet(name, table, **options):
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    write("parquet", name, file.getvalue())


def turns(*texts):
    return [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, texts)]


# As Hugging Face's `datasets` writes conversations.
messages = pa.table({"messages": [turns("Add 17 and 25.", "It is 42."), turns("a", "b", "c", "d\u00e9"), turns("a", "b")],
                     "category": ["x", None, "y"], "score": [0.5, 1.5, 2.5]})
parquet("messages", messages)
parquet("gzip", messages, compression="gzip", data_page_version="2.0")
columns = pa.table({"prompt": ["a", "a", "b"] * 20, "completion": [f"text {i}" for i in range(60)], "n": list(range(60)),
                    "ok": [True, False, None] * 20, "bytes": [b"\xff", None, b"x"] * 20,
                    "map": pa.array([[("k", 1)]] * 60, pa.map_(pa.string(), pa.int32())),
                    "time": pa.array(range(60), pa.timestamp("us"))})
parquet("columns", columns, compression="none", row_group_size=40)
records = columns.select(["prompt", "completion"])
parquet("zstd", records, compression="zstd", row_group_size=40, store_schema=False)
parquet("zstd_2", messages, compression="zstd", data_page_version="2.0", store_schema=False)
parquet("lz4", records.slice(0, 2), compression="lz4", store_schema=False)
questions = pa.table({"question": ["What is a fish?", "Add 17, and 25."], "subject": ["anatomy", "anatomy"],
                      "choices": [["Tope", "Rope", "Hope", "Nope"], ["40", "41", "42", "43"]], "answer": [0, 2]})
parquet("mmlu", questions)
