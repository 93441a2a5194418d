#!/usr/bin/env python3
"""Does the demo's corpus teach the demo's model? LoRA, LoRA-Split and HydraLoRA in PyTorch, as `hydra demo` does it, f32.

  python check.py --model DIR --corpus DIR --mmlu DIR [--methods lora split hydra] [--steps N] [--lr X] [--threads N]

Prints held-out loss by category (template `plain`) and accuracy by subject (0 shots, cloze and letter), before and after.
"""
import argparse, csv, glob, json, math, os, time
import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM, logging

logging.disable_progress_bar()

LABEL = {}  # category → head; the current batch's heads, [records, 1], under the key None
METHODS = dict(lora=("one", 12, 1), split=("label", 3, 4), hydra=("router", 4, 4))  # gate, rank, heads: about equal trainable parameters


class Adapted(nn.Module):
    """Y = X Wᵀ + alpha/rank · (gate ⊗ X Aᵀ) Bᵀ; `label` has an A for each head."""

    def __init__(self, base, gate, rank, heads, alpha):
        super().__init__()
        self.base, self.gate, self.rank, self.heads, self.scale = base, gate, rank, heads, alpha / rank
        bound = 1 / math.sqrt(base.in_features)
        uniform = lambda n: nn.Parameter(torch.empty(n, base.in_features).uniform_(-bound, bound))
        self.a = uniform(rank * heads if gate == "label" else rank)
        self.router = uniform(heads) if gate == "router" else None
        self.b = nn.Parameter(torch.zeros(base.out_features, heads * rank))

    def forward(self, x):
        down = F.linear(x, self.a)
        if self.gate == "router":
            down = (F.linear(x, self.router).softmax(-1)[..., None] * down[..., None, :]).flatten(-2)
        elif self.gate == "label":
            down = (F.one_hot(LABEL[None], self.heads)[..., None] * down.unflatten(-1, (self.heads, self.rank))).flatten(-2)
        return self.base(x) + self.scale * F.linear(down, self.b)


def padded(rows):
    ids = torch.zeros(len(rows), max(len(s) + len(t) for s, t, _ in rows), dtype=torch.long)
    want = torch.full_like(ids, -100)
    for i, (s, t, _) in enumerate(rows):
        ids[i, :len(s) + len(t)] = torch.tensor(s + t)
        want[i, len(s):len(s) + len(t)] = torch.tensor(t)
    return ids, want


def token_losses(model, rows):
    """Per record: the loss of each target token."""
    LABEL[None] = torch.tensor([[LABEL.get(c, 0)] for _, _, c in rows])
    ids, want = padded(rows)
    return F.cross_entropy(model(input_ids=ids, use_cache=False).logits[:, :-1].transpose(1, 2), want[:, 1:], reduction="none"), want[:, 1:] >= 0


@torch.no_grad()
def evaluate(model, tok, test, mmlu):
    out = {}
    for c in sorted({r[2] for r in test}):
        loss, mask = token_losses(model, [r for r in test if r[2] == c])
        out[c] = dict(loss=round((loss.sum() / mask.sum()).item(), 3))
    for name in sorted(glob.glob(f"{mmlu}/test/*_test.csv")):
        subject = os.path.basename(name)[:-len("_test.csv")]
        header = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        cloze, letter, questions = 0, 0, 0
        for q, *options, right in csv.reader(open(name, encoding="utf-8", newline="")):
            right, questions = "ABCD".index(right), questions + 1
            bare = tok.encode(f"{header}{q}\nAnswer:").ids
            loss, mask = token_losses(model, [(bare, tok.encode(f" {o}", add_special_tokens=False).ids, subject) for o in options])
            cloze += (loss.sum(1) / mask.sum(1)).argmin().item() == right
            listed = tok.encode(f"{header}{q}\n" + "".join(f"{l}. {o}\n" for l, o in zip("ABCD", options)) + "Answer:").ids
            loss, _ = token_losses(model, [(listed, tok.encode(f" {l}", add_special_tokens=False).ids[-1:], subject) for l in "ABCD"])
            letter += loss.sum(1).argmin().item() == right
        out[subject] |= dict(cloze=cloze / questions, letter=letter / questions)
    return out


def table(when, scores):
    for c, s in scores.items():
        print(f"  {when:7} {c:11} loss {s['loss']:6.3f}  cloze {s['cloze']:5.0%}  letter {s['letter']:5.0%}")
    mean = lambda k: sum(s[k] for s in scores.values()) / len(scores)
    print(f"  {when:7} {'mean':11} loss {mean('loss'):6.3f}  cloze {mean('cloze'):5.1%}  letter {mean('letter'):5.1%}", flush=True)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--model", required=True)
    p.add_argument("--corpus", required=True)
    p.add_argument("--mmlu", required=True)
    p.add_argument("--methods", nargs="*", default=list(METHODS))
    p.add_argument("--steps", type=int, default=400)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--alpha", type=float, default=32)
    p.add_argument("--warmup", type=int, default=10)
    p.add_argument("--clip", type=float, default=1.0)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=1)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    tok = Tokenizer.from_file(f"{a.model}/tokenizer.json")

    def load(name):
        rows = [json.loads(line) for line in open(f"{a.corpus}/{name}.jsonl", encoding="utf-8")]
        return [(tok.encode(r["instruction"] + "\n").ids, tok.encode(r["response"], add_special_tokens=False).ids + [1], r["category"]) for r in rows]

    train, test = load("train"), load("test")
    LABEL.update({c: i for i, c in enumerate(sorted({r[2] for r in train}))})
    base = lambda: LlamaForCausalLM.from_pretrained(a.model, dtype=torch.float32).requires_grad_(False)
    lengths = [len(s) + len(t) for s, t, _ in train]
    print(f"train {len(train)} records, {sum(lengths)} tokens, longest {max(lengths)}")
    table("before", evaluate(base(), tok, test, a.mmlu))
    for method in a.methods:
        gate, rank, heads = METHODS[method]
        torch.manual_seed(a.seed)
        model = base()
        for layer in model.model.layers:
            for part in (layer.self_attn, layer.mlp):
                for name, linear in list(part.named_children()):
                    if isinstance(linear, nn.Linear):
                        setattr(part, name, Adapted(linear, gate, rank, heads, a.alpha))
        weights = [w for w in model.parameters() if w.requires_grad]
        print(f"{method}: {gate}, rank {rank}, heads {heads}, {sum(w.numel() for w in weights)} trainable parameters")
        opt = torch.optim.AdamW(weights, lr=a.lr, weight_decay=0)
        order, start, seen = [], time.time(), 0
        for step in range(a.steps):
            if len(order) < a.batch:
                order += torch.randperm(len(train)).tolist()
            rows, order = [train[i] for i in order[:a.batch]], order[a.batch:]
            for g in opt.param_groups:
                g["lr"] = a.lr * min((step + 1) / a.warmup, 0.5 * (1 + math.cos(math.pi * step / a.steps)))
            loss, mask = token_losses(model, rows)
            loss = loss.sum() / mask.sum()
            opt.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, a.clip)
            opt.step()
            seen += sum(len(s) + len(t) for s, t, _ in rows)
            if (step + 1) % 50 == 0:
                print(f"  step {step + 1} loss {loss.item():.3f} tokens/s {seen / (time.time() - start):.0f}", flush=True)
        table("after", evaluate(model, tok, test, a.mmlu))


if __name__ == "__main__":
    main()
