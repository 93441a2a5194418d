#!/usr/bin/env python3
"""The work of `cargo bench --features cuda --bench gpu` in PyTorch on the same card. The bench runs this script if HYDRA_PYTHON names
a Python with PyTorch.

By default: cuBLAS's products at LLaMA-2-7B's shapes, and the cost of an adapter over them, forward and backward: as PEFT's LoRA of
the same rank, as HydraLoRA's published layer (a loop over heads), and as that layer rewritten with one product for [A; R] and one
for all B. With --step (which needs transformers): whole training steps of a LLaMA-2-7B with random weights.
"""
import argparse
import math
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

SHAPES = [("q,k,v,o", 4096, 4096), ("gate,up", 11008, 4096), ("down", 4096, 11008)]
ALPHA = 32


class Lora(nn.Module):
    def __init__(self, d_in, d_out, rank, _heads):
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, d_in))
        self.b = nn.Parameter(torch.zeros(d_out, rank))
        self.scale = ALPHA / rank
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x, weight):
        return F.linear(x, weight) + F.linear(F.linear(x, self.a), self.b) * self.scale


class Loop(nn.Module):
    """The published layer: A is multiplied again for every head."""

    def __init__(self, d_in, d_out, rank, heads):
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, d_in))
        self.route = nn.Parameter(torch.empty(heads, d_in))
        self.b = nn.ParameterList(nn.Parameter(torch.zeros(d_out, rank)) for _ in range(heads))
        self.scale = ALPHA / rank
        for p in (self.a, self.route):
            nn.init.kaiming_uniform_(p, a=math.sqrt(5))

    def forward(self, x, weight):
        y = F.linear(x, weight)
        gate = F.softmax(F.linear(x, self.route), dim=-1, dtype=torch.float32).to(y.dtype)
        for i, b in enumerate(self.b):
            y = y + gate[..., i].unsqueeze(-1) * F.linear(F.linear(x, self.a), b) * self.scale
        return y


class Rewritten(nn.Module):
    def __init__(self, d_in, d_out, rank, heads):
        super().__init__()
        self.rank, self.scale = rank, ALPHA / rank
        self.stacked = nn.Parameter(torch.empty(rank + heads, d_in))
        self.b = nn.Parameter(torch.zeros(d_out, heads * rank))
        nn.init.kaiming_uniform_(self.stacked, a=math.sqrt(5))

    def forward(self, x, weight):
        y, state = F.linear(x, weight), F.linear(x, self.stacked)
        gate = F.softmax(state[..., self.rank:], dim=-1, dtype=torch.float32).to(y.dtype)
        mixed = (gate.unsqueeze(-1) * state[..., None, : self.rank]).flatten(-2)
        return y.view(-1, y.shape[-1]).addmm_(mixed.view(-1, mixed.shape[-1]), self.b.t(), alpha=self.scale).view_as(y)


def seconds(call, args):
    """Seconds of a call: the fastest of five rounds of twenty."""
    def wait():
        if args.device == "cuda":
            torch.cuda.synchronize()

    def several(calls):
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        return (time.perf_counter() - start) / calls

    several(3)
    return min(several(20 if args.device == "cuda" else 1) for _ in range(5))


def layers(args):
    print(f"PyTorch {torch.__version__}, {args.tokens} tokens")
    for name, d_out, d_in in SHAPES:
        d_out, d_in = d_out // args.shrink, d_in // args.shrink
        make = dict(device=args.device, dtype=torch.bfloat16)
        weight = torch.randn(d_out, d_in, **make) * 0.02
        x, dy = (torch.randn(args.tokens, width, **make) for width in (d_in, d_out))
        forward = seconds(lambda: F.linear(x, weight), args)
        backward = seconds(lambda: dy @ weight, args)
        rate = lambda t: 2e-12 * args.tokens * d_in * d_out / t
        print(f"{name:<8} the frozen product: {rate(forward):.0f} and {rate(backward):.0f} TFLOP/s")
        for rank, heads in [(8, 3), (8, 4), (16, 3), (16, 4)]:
            for kind in (Lora, Loop, Rewritten):
                layer = kind(d_in, d_out, rank, heads).to(**make)
                x.requires_grad_(True)
                with torch.no_grad():
                    adapted_forward = seconds(lambda: layer(x, weight), args)

                def both():
                    layer(x, weight).backward(dy)
                    x.grad = None
                    layer.zero_grad(set_to_none=True)

                adapted = seconds(both, args)
                more = lambda t, frozen: 100 * (t / frozen - 1)
                print(f"{name:<8} r {rank:>2} N {heads} {kind.__name__:<10} forward {1e6 * adapted_forward:>6.0f} us, "
                      f"{more(adapted_forward, forward):>5.1f} % more; with backward {1e6 * adapted:>6.0f} us, "
                      f"{more(adapted, forward + backward):>5.1f} % more", flush=True)


def step(args):
    from transformers import LlamaConfig, LlamaForCausalLM

    class Adapted(nn.Module):
        def __init__(self, linear, kind):
            super().__init__()
            self.register_buffer("weight", linear.weight.data, persistent=False)
            d_out, d_in = linear.weight.shape
            self.adapter = kind(d_in, d_out, args.rank, args.heads).to(linear.weight)

        def forward(self, x):
            return self.adapter(x, self.weight)

    config = LlamaConfig(hidden_size=4096 // args.shrink, intermediate_size=11008 // args.shrink,
                         num_hidden_layers=args.layers, num_attention_heads=32 // min(args.shrink, 8),
                         vocab_size=32000, max_position_embeddings=4096)
    for kind in (Lora, Loop, Rewritten):
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(args.device):
            model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        for p in model.parameters():
            p.requires_grad_(False)
        for module in list(model.model.layers.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, Adapted(child, kind))
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
        ids = torch.randint(20, 31999, (args.batch, args.seq), device=args.device)
        times, loss = [], None
        try:
            for _ in range(args.steps + 2):
                start = time.perf_counter()
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                loss.item()
                times.append(time.perf_counter() - start)
            rate = args.batch * args.seq / statistics.median(times[2:])
            peak = torch.cuda.max_memory_allocated() >> 20 if args.device == "cuda" else 0
            print(f"{kind.__name__:<10} {rate:.0f} tokens/s, {peak} MiB", flush=True)
        except torch.OutOfMemoryError as error:
            print(f"{kind.__name__:<10} {str(error).splitlines()[0]}", flush=True)
        del model, trained, optimizer, p, module, child, loss
        if args.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--shrink", type=int, default=1, help="divide all widths by this, to try the script itself")
    parser.add_argument("--step", action="store_true", help="whole training steps")
    for name, value in dict(rank=8, heads=4, layers=32, batch=2, seq=2048, steps=5).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    step(args) if args.step else layers(args)


if __name__ == "__main__":
    main()
