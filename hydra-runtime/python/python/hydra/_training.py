"""Fine-tuning and evaluation: loops over the native trainer and evaluator."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Optional, Union

import numpy as np
import numpy.typing as npt

from . import _hydra
from ._model import Model, Tokens

Example = Union[
    tuple[str, str],
    tuple[str, str, int],
    tuple[Tokens, npt.NDArray[np.int64]],
    tuple[Tokens, npt.NDArray[np.int64], int],
    tuple[Tokens, int],
    tuple[Tokens, int, int],
]
"""A prompt and its answer; or tokens and for each of them the token that is to follow (negative: no loss), or how many of
them are the prompt. For the label gate, also the head of the example's label."""


class Finetuned(NamedTuple):
    """What came of a fine-tuning."""

    adapter: _hydra.Adapter
    """The adapter after the last step."""
    losses: npt.NDArray[np.float64]
    """The mean loss of each step's targets, before its update."""


class Step(NamedTuple):
    """What one step did."""

    loss: float
    """Mean negative log-likelihood of the step's targets, before the update."""
    grad_norm: float
    """Norm of the gradient, before clipping."""
    tokens: int
    """Tokens that went through the model."""
    targets: int
    """Targets among them."""


class Evaluation(NamedTuple):
    """Losses of some examples."""

    loss: float
    """Mean negative log-likelihood of all targets, in nats."""
    nll: npt.NDArray[np.float64]
    """Each example's negative log-likelihood, summed over its targets."""
    targets: npt.NDArray[np.uint64]
    """Each example's number of targets."""


def encode(model: Model, example: Example) -> tuple[Any, Any, Optional[int]]:
    """An example as the native functions take it. An answer ends with the model's end-of-text token."""
    if isinstance(example, str) or len(example) not in (2, 3):
        raise TypeError("an example: expected two texts, or tokens and targets, and for the label gate a head")
    first, second = example[0], example[1]
    head = example[2] if len(example) > 2 else None
    if isinstance(first, str) and isinstance(second, str):
        prompt = model.encode(first, begins=True)
        end = [] if model.eos is None else [model.eos]
        answer = np.concatenate([model.encode(second), np.array(end, dtype=np.uint32)])
        return np.concatenate([prompt, answer]), len(prompt), head
    if isinstance(first, str) or isinstance(second, str):
        raise TypeError("an example: expected two texts, or tokens and targets")
    if isinstance(second, (int, np.integer)) and not isinstance(second, bool):
        return first, int(second), head
    found = np.asarray(second)
    if found.ndim != 1 or (found.dtype.kind not in "iu" and found.size > 0):
        kind = f"{found.ndim} dimensions of {found.dtype}"
        raise ValueError(f"targets: expected whole numbers in one dimension, found {kind}")
    targets = found.astype(np.int64)
    if not np.array_equal(targets, found):
        raise ValueError(f"targets: {found.max()} is no token id")
    return first, targets, head


class Trainer(_hydra.Trainer):
    """An adapter in training, for loops of your own; :func:`finetune` is one.

    :param adapter: where to start. It is not changed: :meth:`adapter` gives the trained one.
    :param max_tokens: the most tokens in one pass over the model; no example may be longer.
    :param clip: gradients are clipped to this global norm; ``None`` for any.
    :param weight_decay: of AdamW.
    :param seed: of dropout.
    :param checkpoint_activations: saves memory and costs time.

    For one thread at a time: a call during another thread's :meth:`step` raises ``RuntimeError``.
    """

    def __new__(
        cls,
        model: Model,
        adapter: _hydra.Adapter,
        *,
        max_tokens: int = 2048,
        clip: Optional[float] = 1.0,
        weight_decay: float = 0.0,
        seed: int = 0,
        checkpoint_activations: bool = False,
    ) -> Trainer:
        settings = {
            "max_tokens": max_tokens,
            "clip": clip,
            "weight_decay": weight_decay,
            "seed": seed,
            "checkpoint_activations": checkpoint_activations,
        }
        self = super().__new__(cls, model, adapter, settings)
        self._model = model
        return self

    def step(self, examples: Iterable[Example], lr: float, router_lr: Optional[float] = None) -> Step:  # type: ignore[override]
        """One step of AdamW on ``examples``, see :data:`Example`; ``router_lr`` is the routers' rate, by default the same.

        After an exception the adapter is as it was before the step. If the loss isn't finite (``ArithmeticError``), the
        last step, which has led there, is taken back too: ``steps`` says so. Ctrl-C may come just as a step is done:
        ``KeyboardInterrupt`` is raised all the same, and ``steps`` counts the step."""
        encoded = [encode(self._model, example) for example in examples]
        return Step(*super().step(encoded, lr, router_lr))


def finetune(
    model: Model,
    examples: Sequence[Example],
    *,
    adapter: Optional[_hydra.Adapter] = None,
    epochs: int = 1,
    batch_size: int = 8,
    lr: float = 1e-3,
    router_lr: Optional[float] = None,
    schedule: str = "cosine",
    warmup: float = 0.03,
    max_tokens: int = 2048,
    clip: Optional[float] = 1.0,
    weight_decay: float = 0.0,
    seed: int = 0,
    checkpoint_activations: bool = False,
    callback: Optional[Callable[[int, float], Any]] = None,
) -> Finetuned:
    """Trains an adapter on examples with AdamW; the model's own weights stay as they are.

    :param examples: see :data:`Example`. Each epoch takes them in another order.
    :param adapter: where to start; by default ``model.init_adapter(seed=seed)``. It is not changed.
    :param lr: the highest learning rate; ``router_lr`` is the routers', by default the same.
    :param schedule: ``"constant"``, ``"linear"`` or ``"cosine"``: after a warm-up of this share of the steps.
    :param max_tokens: the most tokens in one pass over the model; no example may be longer.
    :param clip: gradients are clipped to this global norm.
    :param seed: of initialisation, order and dropout.
    :param checkpoint_activations: saves memory and costs time.
    :param callback: is called with each step's number and loss.

    Ctrl-C raises ``KeyboardInterrupt`` and ends it.
    """
    if schedule not in ("constant", "linear", "cosine"):
        raise ValueError(f'schedule {schedule!r}: expected "constant", "linear" or "cosine"')
    if not examples:
        raise ValueError("no examples to train on")
    if batch_size < 1 or epochs < 0:
        raise ValueError(f"batch_size {batch_size}, epochs {epochs}: expected at least 1 and at least 0")
    encoded = [encode(model, example) for example in examples]
    trainer = Trainer(
        model,
        model.init_adapter(seed=seed) if adapter is None else adapter,
        max_tokens=max_tokens,
        clip=clip,
        weight_decay=weight_decay,
        seed=seed,
        checkpoint_activations=checkpoint_activations,
    )
    order = np.random.default_rng(seed)
    per_epoch = math.ceil(len(encoded) / batch_size)
    losses = []
    for epoch in range(epochs):
        shuffled = order.permutation(len(encoded))
        for at in range(per_epoch):
            batch = [encoded[i] for i in shuffled[at * batch_size : (at + 1) * batch_size]]
            factor = _factor(schedule, warmup, epoch * per_epoch + at, epochs * per_epoch)
            step = trainer.step(batch, lr * factor, None if router_lr is None else router_lr * factor)
            losses.append(step.loss)
            if callback is not None:
                callback(len(losses), step.loss)
    return Finetuned(trainer.adapter(), np.array(losses))


def _factor(schedule: str, warmup: float, step: int, steps: int) -> float:
    """The share of the highest learning rate that step ``step`` of ``steps``, counted from 0, takes."""
    warm = math.ceil(warmup * steps)
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(steps - warm, 1)
    if schedule == "linear":
        return 1.0 - done
    return 0.5 * (1.0 + math.cos(math.pi * done)) if schedule == "cosine" else 1.0


def evaluate(
    model: Model,
    examples: Iterable[Example],
    *,
    adapter: Optional[_hydra.Adapter] = None,
    max_tokens: int = 2048,
) -> Evaluation:
    """The losses of examples, with an adapter or without."""
    nll, targets = _hydra.losses(model, [encode(model, example) for example in examples], adapter, max_tokens)
    total = int(targets.sum())
    return Evaluation(float(nll.sum() / total) if total else math.nan, nll, targets)
