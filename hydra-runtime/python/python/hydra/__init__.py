"""HydraLoRA adapters: fine-tune, evaluate and generate, without PyTorch.

>>> import hydra
>>> model = hydra.Model("smollm2")                        # a Hugging Face folder or a GGUF file
>>> trained = hydra.finetune(model, [("What has nine heads?", " A hydra.")], epochs=20)
>>> trained.adapter.save("adapter")
>>> hydra.generate(model, "What has nine heads?", adapter=trained.adapter, max_tokens=8)
' A hydra.'

``hydra.torch`` has the layer for PyTorch.
"""

from ._hydra import Adapter, Error, TextStream, __version__
from ._model import Model, generate
from ._training import Evaluation, Finetuned, Step, Trainer, evaluate, finetune

__all__ = [
    "Adapter",
    "Error",
    "Evaluation",
    "Finetuned",
    "Model",
    "Step",
    "TextStream",
    "Trainer",
    "__version__",
    "evaluate",
    "finetune",
    "generate",
]
