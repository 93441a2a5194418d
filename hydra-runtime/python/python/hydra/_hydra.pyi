"""The native module; ``hydra`` is its public face."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Optional, Union

import numpy as np
import numpy.typing as npt

from ._model import Prompt, StrPath, Tokens

__version__: str

class Error(RuntimeError):
    """An error of Hydra that no exception of Python's names."""

class Model:
    def __new__(
        cls,
        files: Union[StrPath, bytes, Mapping[str, bytes]],
        *,
        device: str = "cpu",
        threads: Optional[int] = None,
        precision: str = "f32",
    ) -> "Model": ...
    @property
    def config(self) -> dict[str, Any]:
        """Sizes: vocab, d_model, d_ffn, layers, n_heads, kv_heads, head_dim, context; and the tokens that end a text."""
    @property
    def eos(self) -> Optional[int]:
        """The token that ends a text."""
    def encode(self, text: str, *, begins: bool = False) -> npt.NDArray[np.uint32]:
        """Token ids; with ``begins`` behind the beginning-of-text token, if the model has one."""
    def decode(self, tokens: Tokens) -> str:
        """The text of token ids, without special tokens and ids that the tokenizer doesn't have."""
    def logits(self, tokens: Tokens, *, adapter: Optional["Adapter"] = None) -> npt.NDArray[np.float32]:
        """[tokens, vocab]: the logits of what may follow after each token."""
    def _generate(self, prompt: Prompt, options: dict[str, Any]) -> str: ...
    def _stream(self, prompt: Prompt, options: dict[str, Any]) -> "TextStream": ...

class TextStream(Iterator[str]):
    """Pieces of a text as it is generated. For one thread at a time: others get a ``RuntimeError`` meanwhile."""

    def __iter__(self) -> "TextStream": ...
    def __next__(self) -> str:
        """After ``KeyboardInterrupt`` ``tokens`` may already have those of a piece that was not returned."""
    @property
    def tokens(self) -> npt.NDArray[np.uint32]:
        """The tokens so far, without the one that ended the text."""

class Adapter:
    """A LoRA, LoRA-Split or HydraLoRA adapter. ``Model.init_adapter``, ``Model.load_adapter`` and ``load`` make one.

    It keeps the model that it was last used with in memory, for the next use.
    """

    @staticmethod
    def load(folder: StrPath, model: Optional[Model] = None) -> "Adapter":
        """Reads a folder of this library, of the published implementation or of HF PEFT. With a model, the adapter has
        to fit it."""
    def head(self, head: int) -> "Adapter":
        """One head with its A and B as a LoRA, without the gate. Of an adapter with the label gate, it generates as
        trained for the label ``config["labels"][head]``."""
    def save(self, folder: StrPath) -> None:
        """Writes adapter_model.safetensors and adapter_config.json. A LoRA's folder is one of PEFT's."""
    @property
    def parameters(self) -> int:
        """Number of trainable parameters."""
    @property
    def config(self) -> dict[str, Any]:
        """method, gate, rank, lora_heads, alpha, rslora, scale, dropout, targets, labels, head_dropout, load_balance,
        temperature, top_k, layers."""
    def tensors(self) -> list[tuple[str, npt.NDArray[np.float32]]]:
        """Copies of the tensors, with their names in the file."""
    def pair(self, layer: int, target: str) -> Optional[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
        """Copies of one projection's matrices: A over the router's R [rows, d_in], and B [d_out, heads * rank]."""
    @staticmethod
    def _init(model: Model, settings: dict[str, Any], seed: int) -> "Adapter": ...

class Trainer:
    """``hydra.Trainer`` is its public face."""

    def __new__(cls, model: Model, adapter: Adapter, settings: dict[str, Any]) -> "Trainer": ...
    def step(
        self, examples: Sequence[tuple[Any, Any, Optional[int]]], lr: float, router_lr: Optional[float] = None
    ) -> tuple[float, float, int, int]:
        """One step of AdamW; returns loss, gradient norm, tokens and targets."""
    def adapter(self) -> Adapter:
        """A copy of the adapter as it is now."""
    @property
    def steps(self) -> int:
        """Steps taken."""

def losses(
    model: Model, examples: Sequence[tuple[Any, Any, Optional[int]]], adapter: Optional[Adapter], max_tokens: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.uint64]]: ...

class Layer:
    """The operator on arrays, for ``hydra.torch``: contiguous, f32 or the bits of bf16 as uint16."""

    NO_LORA_HEAD: int
    def __new__(cls, settings: dict[str, Any]) -> "Layer": ...
    @property
    def state_width(self) -> int: ...
    def forward(
        self,
        x: Any,
        parameters: tuple[Any, Any, Any],
        outputs: tuple[Any, Any],
        labels: Any,
        dropout: tuple[float, int],
    ) -> None: ...
    def backward(
        self,
        inputs: tuple[Any, Any, Any],
        parameters: tuple[Any, Any, Any],
        gradients: tuple[Any, Any],
        labels: Any,
        dropout: tuple[float, int],
    ) -> None: ...
