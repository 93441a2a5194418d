"""Models: the native class, with keyword arguments and documentation."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Optional, Union

import numpy as np
import numpy.typing as npt

from . import _hydra

Tokens = Union[npt.NDArray[np.uint32], npt.NDArray[np.int64], Sequence[int]]
Prompt = Union[str, Tokens, Sequence[Mapping[str, str]]]
StrPath = Union[str, "os.PathLike[str]"]

_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


class Model(_hydra.Model):
    """A language model with its tokenizer.

    :param files: a Hugging Face folder or a GGUF file; or the bytes of a GGUF file; or the bytes of a folder's files by
        their names.
    :param device: ``"cpu"``, or ``"cuda:N"`` if the package was built with the feature ``cuda``.
    :param threads: of the CPU; by default one a core.
    :param precision: what matrices are multiplied in: ``"f32"``, ``"bf16"`` with sums in f32, or for evaluation and
        generation ``"q8"``: activations in eight bits beside weights in GGUF's block formats, other products in f32.

    Several threads may use one model. Work is done without the GIL, and Ctrl-C ends it.
    """

    __slots__ = ()

    def generate(
        self,
        prompt: Prompt,
        *,
        adapter: Optional[_hydra.Adapter] = None,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> str:
        """The text after a prompt: a text, token ids, or a chat's messages ``{"role": .., "content": ..}``.

        :param max_tokens: the most tokens to write; the model's context limits it, too.
        :param temperature: draws from softmax(logits / temperature); 0 takes the likeliest token each time.
        :param top_k: draws from this many of the likeliest tokens, and from others as likely as the last of them; 0: from all.
        :param top_p: draws from the likeliest of these that together have this probability.
        :param min_p: draws from those of these that have at least this share of the likeliest one's probability.
        :param repetition_penalty: divides positive logits of tokens in the prompt and the text, and multiplies negative ones.
        :param presence_penalty: taken from the logit of each token in the text.
        :param frequency_penalty: the same, for each time that the text has it.
        :param seed: the same seed draws the same text.
        :param stop: the text ends before the first of these that appears.
        """
        options = _options(
            adapter=adapter,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            seed=seed,
            stop=stop,
        )
        return self._generate(prompt, options)

    def stream(
        self,
        prompt: Prompt,
        *,
        adapter: Optional[_hydra.Adapter] = None,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> _hydra.TextStream:
        """:meth:`generate` as an iterator over pieces of the text, whole characters each."""
        options = _options(
            adapter=adapter,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            seed=seed,
            stop=stop,
        )
        return self._stream(prompt, options)

    def load_adapter(self, folder: StrPath) -> _hydra.Adapter:
        """Reads an adapter's folder for this model. Raises ``ValueError`` if it is another model's."""
        return _hydra.Adapter.load(folder, self)

    def init_adapter(
        self,
        *,
        method: str = "hydra",
        gate: Optional[str] = None,
        rank: int = 4,
        lora_heads: Optional[int] = None,
        alpha: float = 32.0,
        dropout: float = 0.05,
        targets: Sequence[str] = _FEED_FORWARD,
        labels: Sequence[str] = (),
        head_dropout: float = 0.0,
        temperature: float = 1.0,
        top_k: Optional[int] = None,
        load_balance: float = 0.0,
        seed: int = 0,
    ) -> _hydra.Adapter:
        """A new adapter, which changes nothing yet.

        :param method: ``"hydra"`` (one A, many B), ``"lora"``, or ``"split"`` (an A and a B for each head).
        :param gate: ``"router"``, ``"label"``, ``"uniform"`` or ``"one"``; by default the method's own.
        :param rank: of each head.
        :param lora_heads: number of B matrices; by default 4, or 1 for a LoRA.
        :param alpha: the heads' sum is scaled by alpha / rank.
        :param dropout: probability of dropping a value of A's input in training.
        :param targets: projections such as ``"q_proj"``; by default the feed-forward's three.
        :param labels: names of the heads under the label gate.
        :param head_dropout: probability of dropping a value of the mixed heads in training.
        :param temperature: the router's logits are divided by it.
        :param top_k: only this many of a token's largest logits take part; by default all.
        :param load_balance: weight of the load-balancing loss in training.
        """
        heads = lora_heads if lora_heads is not None else 1 if method == "lora" else 4
        settings = {
            "method": method,
            "gate": gate,
            "rank": rank,
            "lora_heads": heads,
            "alpha": alpha,
            "dropout": dropout,
            "targets": list(targets),
            "labels": list(labels),
            "head_dropout": head_dropout,
            "temperature": temperature,
            "top_k": top_k,
            "load_balance": load_balance,
        }
        return _hydra.Adapter._init(self, settings, seed)


def _options(*, max_tokens: int, top_k: int, seed: int, stop: Sequence[str], **others: Any) -> dict[str, Any]:
    if max_tokens < 0 or top_k < 0 or not 0 <= seed < 2**64:
        found = f"max_tokens {max_tokens}, top_k {top_k}, seed {seed}"
        raise ValueError(f"{found}: expected at least 0, and a seed below 2**64")
    stops = [stop] if isinstance(stop, str) else list(stop)
    return {"max_tokens": max_tokens, "top_k": top_k, "seed": seed, "stop": stops, **others}


def generate(model: Model, prompt: Prompt, **options: Any) -> str:
    """``model.generate(prompt, **options)``."""
    return model.generate(prompt, **options)
