#!/usr/bin/env python3
"""Makes the tiny LLaMA that `hydra demo` embeds: a byte-level BPE of 2,048 tokens and 1.0 M parameters, in Hugging Face's format.

  python pretrain.py --train FILE.jsonl... --test FILE.jsonl... --out DIR [--mmlu DIR] [--steps N] [--minutes M] [--threads N] [--bf16]

Records are {instruction, context, response, category}. A document is `<s>instruction[\ncontext]\nresponse</s>`; those of at most --longest tokens
are shuffled each epoch and packed into sequences of --seq tokens. --mmlu names a folder of the original distribution (dev/, val/): its questions are
added with the right answer's text, so that the model has met the format. --drills documents of our own making teach a model with so few tokens to
copy, to count places in a list and to look a key up. The run ends after --steps or --minutes, whichever is first; the cosine spans it.
DIR gets config.json, tokenizer.json and model.safetensors (bf16).
"""
import argparse, collections, csv, glob, json, math, os, random, re, time
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 2048
CONFIG = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=VOCAB, hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, intermediate_size=352, hidden_act="silu", max_position_embeddings=512, rms_norm_eps=1e-5,
    rope_theta=10000.0, tie_word_embeddings=True, attention_bias=False, mlp_bias=False, bos_token_id=0, eos_token_id=1, initializer_range=0.05,
)


def documents(files, exclude, mmlu=None):
    """The text of every record, without the two special tokens."""
    texts = []
    for name in files:
        for line in open(name, encoding="utf-8"):
            r = json.loads(line)
            if r["category"] not in exclude:
                texts.append("\n".join(p for p in (r["instruction"], r["context"], r["response"]) if p))
    for name in sorted(glob.glob(f"{mmlu}/dev/*.csv") + glob.glob(f"{mmlu}/val/*.csv")) if mmlu else ():
        subject = os.path.basename(name).rsplit("_", 1)[0].replace("_", " ")
        head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        for q, a, b, c, d, letter in csv.reader(open(name, encoding="utf-8", newline="")):
            texts.append(f"{head}{q}\nAnswer: {(a, b, c, d)['ABCD'.index(letter)]}")
    return texts


ORDINALS = "First Second Third Fourth Fifth".split()
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()


def drills(texts, count, seed):
    """Lists, repetitions, tables and sums of small numbers."""
    rng = random.Random(seed)
    pool = [w for w, _ in collections.Counter(w for t in texts for w in re.findall(r"\b[a-z]{3,8}\b", t)).most_common(800)]
    return ["\n".join(rng.choice((places, repetition, table, sums))(rng, pool)) for _ in range(count)]


def places(rng, pool):
    w = rng.sample(pool, rng.randint(3, 5))
    asked = [f"{o}: {x}" for o, x in zip(ORDINALS, w)] + [f"Last: {w[-1]}"]
    return [f"List: {', '.join(w)}", *rng.sample(asked, 3)]


def repetition(rng, pool):
    w = " ".join(rng.sample(pool, rng.randint(4, 14)))
    return [w, w]


def table(rng, pool):
    w = rng.sample(pool, 2 * rng.randint(3, 5))
    pairs = list(zip(w[::2], w[1::2]))
    say, ask = rng.choice((("{}: {}", "{}? {}"), ("The {} is {}.", "What is the {}? {}"), ("{} = {}", "{} -> {}"), ("The {} has the {}.", "{} has: {}")))
    return [*(say.format(*p) for p in pairs), *(ask.format(*p) for p in rng.sample(pairs, 3))]


def sums(rng, pool):
    out = []
    for _ in range(4):
        a, b = rng.randint(0, 6), rng.randint(0, 6)
        x, y, z = ((a, b, a + b), (a + b, b, a))[minus := rng.randrange(2)]
        if rng.randrange(2):
            x, y, z = NUMBERS[x], NUMBERS[y], NUMBERS[z]
        out.append(f"{x} {'+-'[minus]} {y} = {z}")
    return out


def train_tokenizer(texts):
    tok = Tokenizer(models.BPE())
    # One token a digit: arithmetic is easier to learn, and no merge is spent on years.
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<s>", "</s>"], show_progress=False,
                                                       initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)])
    return tok


def encode(tok, texts, longest):
    return [torch.tensor(e.ids + [1], dtype=torch.int32) for e in tok.encode_batch(texts) if len(e.ids) < longest]


def batches(docs, batch, seq, generator):
    """Endless [batch, seq + 1] rows of packed documents, reshuffled each epoch."""
    need = batch * seq + 1
    stream = torch.empty(0, dtype=torch.int32)
    while True:
        order = torch.randperm(len(docs), generator=generator)
        stream = torch.cat([stream] + [docs[i] for i in order])
        while len(stream) >= need:
            rows = stream[:need].long()
            yield rows[:-1].view(batch, seq), rows[1:].view(batch, seq)
            stream = stream[batch * seq:]


def loss_of(model, x, y, bf16):
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(input_ids=x, use_cache=False).logits
    return F.cross_entropy(logits.float().view(-1, VOCAB), y.reshape(-1))


def save(model, out):
    state = {k: v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(state, f"{out}/model.safetensors.tmp", metadata={"format": "pt"})
    os.replace(f"{out}/model.safetensors.tmp", f"{out}/model.safetensors")


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--train", nargs="+", required=True)
    p.add_argument("--test", nargs="+", required=True)
    p.add_argument("--mmlu")
    p.add_argument("--exclude", nargs="*", default=["code"])
    p.add_argument("--out", required=True)
    p.add_argument("--steps", type=int, default=2000)
    p.add_argument("--minutes", type=float, default=math.inf)
    p.add_argument("--longest", type=int, default=192)
    p.add_argument("--drills", type=int, default=24000)
    p.add_argument("--warmup", type=int, default=100)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--seq", type=int, default=256)
    p.add_argument("--lr", type=float, default=5e-3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--bf16", action="store_true", help="bf16 autocast")
    p.add_argument("--save-every", type=int, default=200)
    a = p.parse_args()
    torch.manual_seed(a.seed)
    torch.set_num_threads(a.threads)
    os.makedirs(a.out, exist_ok=True)

    texts = documents(a.train, a.exclude, a.mmlu)
    extra = drills(texts, a.drills, a.seed)
    tok = train_tokenizer(texts + extra)
    tok.save(f"{a.out}/tokenizer.json", pretty=False)
    json.dump(CONFIG | {"torch_dtype": "bfloat16"}, open(f"{a.out}/config.json", "w"), indent=2)
    docs = encode(tok, texts + extra, a.longest)
    held = encode(tok, documents(a.test, a.exclude), a.longest)
    x0, y0 = next(batches(held, 64, a.seq, torch.Generator().manual_seed(1)))
    print(f"{len(docs)} documents, {sum(map(len, docs))} tokens", flush=True)

    model = LlamaForCausalLM(LlamaConfig(**CONFIG, attn_implementation="sdpa"))
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    # Muon for the matrices inside blocks: fewer tokens to the same loss than AdamW, and tokens are what a small CPU lacks.
    blocks = [p for p in model.model.layers.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if not any(p is q for q in blocks)]
    optimizers = [torch.optim.Muon(blocks, lr=a.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(rest, lr=a.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]
    feed = batches(docs, a.batch, a.seq, torch.Generator().manual_seed(a.seed))
    start, mean = time.time(), 0.0
    for step in range(1, a.steps + 1):
        done = min(1.0, max(step / a.steps, (time.time() - start) / 60 / a.minutes))
        lr = a.lr * min(step / a.warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        for g in sum((o.param_groups for o in optimizers), []):
            g["lr"] = lr
        loss = loss_of(model, *next(feed), a.bf16)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in optimizers:
            o.step()
        mean += loss.item() / 20
        if step % 20 == 0:
            print(f"step {step} loss {mean:.4f} lr {lr:.2e} tokens/s {step * a.batch * a.seq / (time.time() - start):.0f}", flush=True)
            mean = 0.0
        if step % a.save_every == 0 or done == 1:
            with torch.no_grad():
                held_out = sum(loss_of(model, x0[i:i + 16], y0[i:i + 16], False).item() for i in range(0, 64, 16)) / 4
            print(f"step {step} held-out loss {held_out:.4f}", flush=True)
            save(model, a.out)
        if done == 1:
            break


if __name__ == "__main__":
    main()
