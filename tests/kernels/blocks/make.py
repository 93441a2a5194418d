"""Random blocks of each GGUF format and what PyPI's `gguf` decodes from them: NAME.bin = blocks, NAME.f32 = f32 values.

  pip install gguf numpy && python make.py
"""
import pathlib
import numpy as np
from gguf import GGMLQuantizationType as T
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

BLOCKS = 6
rng = np.random.default_rng(7)
# where each format keeps its f16 scales: random bytes there would be NaN now and then
HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
          "Q2_K": [80, 82], "Q3_K": [108], "IQ4_NL": [0], "IQ4_XS": [0]}
for name, at in HALVES.items():
    length, size = GGML_QUANT_SIZES[T[name]]
    blocks = rng.integers(0, 256, (BLOCKS, size), dtype=np.uint8)
    for offset in at:
        blocks[:, offset:offset + 2] = rng.normal(0, 0.05, BLOCKS).astype(np.float16)[:, None].view(np.uint8)
    here = pathlib.Path(__file__).parent
    (here / f"{name}.bin").write_bytes(blocks.tobytes())
    values = dequantize(blocks, T[name]).astype("<f4")
    assert values.size == BLOCKS * length
    (here / f"{name}.f32").write_bytes(values.tobytes())
