"""What the tests share: the golden model, its adapter, and what PyTorch made of them."""

import json
import pathlib
import struct

import numpy as np
import pytest

import hydra

GOLDEN = pathlib.Path(__file__).parents[3] / "tests" / "golden" / "hydra"


@pytest.fixture(scope="session")
def golden():
    return GOLDEN


@pytest.fixture(scope="session")
def model():
    return hydra.Model(GOLDEN / "model", threads=2)


@pytest.fixture(scope="session")
def adapter(model):
    return model.load_adapter(GOLDEN / "adapter")


def tensors(path):
    """The arrays of a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    types = {"F32": np.float32, "F64": np.float64, "I64": np.int64}
    arrays = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            arrays[name] = np.frombuffer(data[start:end], types[entry["dtype"]]).reshape(entry["shape"])
    return arrays
