"""The operator as a layer for PyTorch, on the CPU.

>>> from hydra.torch import HydraLinear, inject
>>> layer = HydraLinear.wrap(torch.nn.Linear(64, 64), rank=4, lora_heads=4)
>>> inject(model, "adapter")        # puts an adapter of `hydra finetune`, or of the published code, on a LLaMA of transformers

``y = x Wᵀ + alpha / rank · Σ gate_e (x Aᵀ) B_eᵀ`` and its gradients are one call of Hydra's kernels each, which read and
write the tensors' own memory: f32 or bf16, contiguous. Other tensors are copied. Gradients of gradients are an error.
"""

from __future__ import annotations

import math
import os
import warnings
from typing import Any, Optional, Union

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import _hydra

__all__ = ["HydraLinear", "inject"]

_OWN: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever PyTorch's defaults are
_STORED = (torch.float32, torch.bfloat16, torch.float16)


def _array(tensor: Tensor) -> Any:
    """The tensor's memory as an array; types of 16 bits as their bits. Nothing is copied."""
    tensor = tensor.detach()
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.element_size() == 2 else tensor.numpy()


def _plain(tensor: Tensor) -> Tensor:
    """The tensor itself if the kernels can read it, else a copy."""
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        tensor = tensor.float()
    return tensor.contiguous()


class _Operator(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, layer: "HydraLinear", labels: Any, dropout: float) -> Tensor:
        native, rows = layer._native(), _plain(x)
        # The mask is drawn again in the backward pass.
        seed = int(torch.randint(2**62, (), device="cpu").item()) if dropout > 0.0 else 0
        y = torch.empty((*x.shape[:-1], layer.out_features), dtype=rows.dtype, device="cpu")
        state = torch.empty((rows.numel() // layer.in_features, native.state_width), **_OWN)
        weights = (layer.weight.contiguous(), a.float().contiguous(), b.float().contiguous())
        native.forward(_array(rows), tuple(map(_array, weights)), (_array(y), _array(state)), labels, (dropout, seed))
        ctx.save_for_backward(rows, state, *weights)
        ctx.native, ctx.labels, ctx.dropout = native, labels, (dropout, seed)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.types = (a.dtype, b.dtype)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        rows, state, weight, a, b = ctx.saved_tensors
        dy = dy.to(rows.dtype).contiguous()
        needs_x, needs_a, needs_b = ctx.needs_input_grad[:3]
        dx = torch.empty(ctx.shape, dtype=rows.dtype, device="cpu") if needs_x else None
        # Both or none: they come from one product.
        d_adapter = (torch.zeros_like(a), torch.zeros_like(b)) if needs_a or needs_b else None
        ctx.native.backward(
            (_array(dy), _array(rows), _array(state)),
            (_array(weight), _array(a), _array(b)),
            (None if dx is None else _array(dx), None if d_adapter is None else list(map(_array, d_adapter))),
            ctx.labels,
            ctx.dropout,
        )
        return (
            None if dx is None else dx.to(ctx.dtype),
            d_adapter[0].to(ctx.types[0]) if d_adapter is not None and needs_a else None,
            d_adapter[1].to(ctx.types[1]) if d_adapter is not None and needs_b else None,
            None,
            None,
            None,
        )


class HydraLinear(nn.Module):
    """A frozen linear layer with a HydraLoRA, LoRA-Split or LoRA adapter.

    :param weight: [out_features, in_features] in f32, bf16 or f16: frozen, and shared with the caller.
    :param bias: [out_features], frozen; or none.
    :param rank: of each head.
    :param lora_heads: number of B matrices, N.
    :param alpha: the heads' sum is scaled by alpha / rank.
    :param gate: ``"router"``, ``"label"``, ``"uniform"`` or ``"one"``.
    :param per_head_a: an A for each head, as LoRA-Split has.
    :param dropout: probability of dropping a value of A's input in training. The router reads x without dropout.
    :param temperature: the router's logits are divided by it.
    :param top_k: only this many of a token's largest logits take part.
    :param products: ``"f32"``, or ``"bf16"`` for products of bf16 with sums in f32.
    :param threads: by default PyTorch's own number.

    Parameters: ``a`` [rows, in_features], A over the router's R; ``b`` [out_features, N · rank], head e in columns
    e · rank to (e + 1) · rank.
    """

    a: nn.Parameter
    b: nn.Parameter
    weight: Tensor
    bias: Optional[Tensor]

    def __init__(
        self,
        weight: Tensor,
        bias: Optional[Tensor] = None,
        *,
        rank: int = 4,
        lora_heads: int = 4,
        alpha: float = 32.0,
        gate: str = "router",
        per_head_a: bool = False,
        dropout: float = 0.0,
        temperature: float = 1.0,
        top_k: Optional[int] = None,
        products: str = "f32",
        threads: Optional[int] = None,
    ) -> None:
        super().__init__()
        if weight.dim() != 2 or weight.dtype not in _STORED or weight.device.type != "cpu":
            raise ValueError("weight: expected a matrix on the CPU in float32, bfloat16 or float16")
        if rank < 1 or lora_heads < 1:
            raise ValueError(f"rank {rank}, lora_heads {lora_heads}: expected at least 1")
        if products not in ("f32", "bf16"):
            raise ValueError(f'products {products!r}: expected "f32" or "bf16"')
        self.out_features, self.in_features = weight.shape
        self.dropout, self.threads = dropout, threads
        self.settings: dict[str, Any] = {
            "d_in": self.in_features,
            "d_out": self.out_features,
            "rank": rank,
            "lora_heads": lora_heads,
            "per_head_a": per_head_a,
            "gate": gate,
            "temperature": temperature,
            "top_k": top_k,
            "scale": alpha / rank,
            "bf16": products == "bf16",
        }
        self.labels: Optional[Tensor] = None
        """For the label gate: each token's head, of the shape of x without its last dimension; negative for none."""
        self._made: Optional[tuple[tuple[int, torch.dtype], _hydra.Layer]] = None
        self.register_buffer("weight", weight.detach(), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)
        rows = (lora_heads if per_head_a else 1) * rank + (lora_heads if gate == "router" else 0)
        self.a = nn.Parameter(torch.empty(rows, self.in_features, **_OWN))
        self.b = nn.Parameter(torch.zeros(self.out_features, lora_heads * rank, **_OWN))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self._native()

    @classmethod
    def wrap(cls, linear: nn.Linear, **settings: Any) -> "HydraLinear":
        """A new adapter on a linear layer, whose weight it shares."""
        return cls(linear.weight, linear.bias, **settings)

    def _native(self) -> _hydra.Layer:
        dtype = self.weight.dtype  # half(), bfloat16() and to() change it
        if dtype not in _STORED:
            raise ValueError(f"the weight is {dtype}: expected float32, bfloat16 or float16")
        threads = torch.get_num_threads() if self.threads is None else self.threads
        if self._made is None or self._made[0] != (threads, dtype):
            own = {"threads": threads, "f16": dtype == torch.float16}
            self._made = ((threads, dtype), _hydra.Layer({**self.settings, **own}))
        return self._made[1]

    def __getstate__(self) -> dict[str, Any]:
        # Native objects are made again.
        return {**self.__dict__, "_made": None}

    def forward(self, x: Tensor) -> Tensor:
        """[.., in_features] to [.., out_features], of x's type."""
        for name, tensor in (("x", x), ("weight", self.weight), ("a", self.a), ("b", self.b)):
            if tensor.device.type != "cpu":
                raise ValueError(f"{name} is on {tensor.device}: HydraLinear works on the CPU")
        labels = None
        if self.settings["gate"] == "label":
            if self.labels is None or self.labels.shape != x.shape[:-1]:
                raise ValueError("the label gate needs each token's head in `labels`, of the shape of x")
            heads = self.labels.detach().cpu().numpy()
            labels = np.where(heads < 0, _hydra.Layer.NO_LORA_HEAD, heads).astype(np.uint32)
        y: Tensor = _Operator.apply(x, self.a, self.b, self, labels, self.dropout if self.training else 0.0)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        shown = ("rank", "lora_heads", "gate", "scale")
        parts = [f"{self.in_features}, {self.out_features}", *(f"{name}={self.settings[name]}" for name in shown)]
        return ", ".join(parts)


def inject(
    module: nn.Module, adapter: Union[str, "os.PathLike[str]", _hydra.Adapter], **settings: Any
) -> list[HydraLinear]:
    """Puts an adapter on a LLaMA: each adapted ``nn.Linear`` gives its place to a :class:`HydraLinear`.

    :param module: a model with modules such as ``layers.0.mlp.gate_proj``: transformers' ``LlamaForCausalLM``, say.
    :param adapter: an adapter, or the folder of one: of this library, of the published implementation or of HF PEFT.
    :param settings: further settings of :class:`HydraLinear`: ``products``, ``threads``, ``dropout``.
    :returns: the new layers, in the model's order.

    Raises ``ValueError`` if the adapter is another model's; the model is then as it was. Warns of an adapter with head
    dropout or a load-balancing loss, which only :func:`hydra.finetune` has: they are of training alone.
    """
    if not isinstance(adapter, _hydra.Adapter):
        adapter = _hydra.Adapter.load(adapter)
    config, found = adapter.config, []
    lost = [f"{key} {config[key]:g}" for key in ("head_dropout", "load_balance") if config[key] > 0.0]
    if lost:
        warnings.warn(f"in training HydraLinear leaves out the adapter's {' and '.join(lost)}", stacklevel=2)
    left = {(layer, target) for layer in range(config["layers"]) for target in config["targets"]}
    for name, linear in list(module.named_modules()):
        path = name.split(".")
        at = max((i for i, part in enumerate(path) if part == "layers"), default=-1)
        if not isinstance(linear, nn.Linear) or at < 0 or len(path) < at + 3 or not path[at + 1].isdigit():
            continue
        place = (int(path[at + 1]), path[-1])
        if place[1] in config["targets"] and place[0] >= config["layers"]:
            raise ValueError(f"{name}: the adapter is for a model of {config['layers']} layers")
        pair = adapter.pair(*place) if place in left else None
        if pair is None:
            continue
        own = {key: config[key] for key in ("rank", "lora_heads", "gate", "temperature", "top_k", "dropout")}
        # alpha / rank, or alpha / sqrt(rank) of rsLoRA.
        own["alpha"] = config["scale"] * config["rank"]
        new = HydraLinear.wrap(linear, **{**own, "per_head_a": config["method"] == "split", **settings})
        if tuple(new.a.shape) != pair[0].shape or tuple(new.b.shape) != pair[1].shape:
            raise ValueError(
                f"{name}: the adapter is for [{pair[1].shape[0]}, {pair[0].shape[1]}], the layer is {linear}"
            )
        with torch.no_grad():
            new.a.copy_(torch.from_numpy(pair[0]))
            new.b.copy_(torch.from_numpy(pair[1]))
        new.train(linear.training)
        found.append((module.get_submodule(".".join(path[:-1])), path[-1], new))
        left.discard(place)
    if left:
        layer, target = min(left)
        raise ValueError(f"no linear layer for the adapter's layer {layer} {target}, and {len(left) - 1} others")
    for parent, target, new in found:
        setattr(parent, target, new)
    return [new for _, _, new in found]
