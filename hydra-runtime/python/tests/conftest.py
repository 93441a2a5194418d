"""What the tests share: the golden model and its adapter."""

import pathlib

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
