"""The operator on arrays, which `hydra.torch` calls, without PyTorch."""

import numpy as np
import pytest

from hydra._hydra import Layer

TOKENS, IN, OUT, RANK, HEADS = 13, 40, 24, 3, 4


def settings(**changed):
    sizes = {"d_in": IN, "d_out": OUT, "rank": RANK, "lora_heads": HEADS, "per_head_a": False, "scale": 1.5}
    kind = {"gate": "router", "temperature": 0.7, "top_k": None, "f16": False, "bf16": False, "threads": 2}
    return {**sizes, **kind, **changed}


class Case:
    """The arguments of both passes, each of which a test may replace."""

    def __init__(self, gate="router", labels=None):
        random = np.random.default_rng(7)
        rows = RANK + (HEADS if gate == "router" else 0)
        shapes = {"x": (TOKENS, IN), "dy": (TOKENS, OUT), "w": (OUT, IN), "a": (rows, IN), "b": (OUT, HEADS * RANK)}
        for name, shape in shapes.items():
            setattr(self, name, random.normal(size=shape).astype(np.float32))
        self.y, self.dx = np.zeros((TOKENS, OUT), np.float32), np.zeros((TOKENS, IN), np.float32)
        self.da, self.db = np.zeros_like(self.a), np.zeros_like(self.b)
        self.layer, self.labels, self.dropout = Layer(settings(gate=gate)), labels, (0.0, 0)
        self.state = np.zeros((TOKENS, self.layer.state_width), np.float32)

    def forward(self):
        self.layer.forward(self.x, (self.w, self.a, self.b), (self.y, self.state), self.labels, self.dropout)

    def backward(self):
        inputs, gradients = (self.dy, self.x, self.state), (self.dx, [self.da, self.db])
        self.layer.backward(inputs, (self.w, self.a, self.b), gradients, self.labels, self.dropout)


def near(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_both_passes_are_the_formulas():
    case, scale, temperature = Case(), 1.5, 0.7
    case.forward()
    case.backward()
    x, dy, w, stacked, b = (values.astype(np.float64) for values in (case.x, case.dy, case.w, case.a, case.b))
    a, r, b = stacked[:RANK], stacked[RANK:], b.reshape(OUT, HEADS, RANK)
    logits = np.exp(x @ r.T / temperature)
    gate = logits / logits.sum(1, keepdims=True)
    down = x @ a.T
    heads = np.einsum("tr,oer->teo", down, b)
    near(case.y, x @ w.T + scale * np.einsum("te,teo->to", gate, heads))

    d_gate = scale * np.einsum("to,teo->te", dy, heads)
    d_logits = gate * (d_gate - (gate * d_gate).sum(1, keepdims=True)) / temperature
    d_down = scale * np.einsum("te,to,oer->tr", gate, dy, b)
    near(case.dx, dy @ w + d_down @ a + d_logits @ r)
    near(case.da, np.concatenate([d_down.T @ x, d_logits.T @ x]))
    near(case.db, scale * np.einsum("te,to,tr->oer", gate, dy, down).reshape(OUT, HEADS * RANK))


def test_labels_choose_heads():
    labels = (np.arange(TOKENS) % HEADS).astype(np.uint32)
    labels[5] = Layer.NO_LORA_HEAD
    case = Case("label", labels)
    case.forward()
    gate = np.eye(HEADS)[np.where(labels < HEADS, labels, 0)]
    gate[5] = 1 / HEADS
    heads = np.einsum("tr,oer->teo", case.x @ case.a.T, case.b.reshape(OUT, HEADS, RANK))
    near(case.y, case.x @ case.w.T + 1.5 * np.einsum("te,teo->to", gate, heads))


def test_a_nan_stays_in_its_row():
    case, bad = Case(), Case()
    bad.x[3, 1] = np.nan
    for one in (case, bad):
        one.forward()
        one.backward()
    assert np.isnan(bad.y[3]).all() and np.isnan(bad.da).all()
    others = np.arange(TOKENS) != 3
    np.testing.assert_array_equal(bad.y[others], case.y[others])
    np.testing.assert_array_equal(bad.dx[others], case.dx[others])


unaligned = np.frombuffer(bytearray(TOKENS * IN * 4 + 1), np.float32, offset=1).reshape(TOKENS, IN)
read_only = np.zeros((TOKENS, OUT), np.float32)
read_only.flags.writeable = False


@pytest.mark.parametrize(
    "name, value, error, text",
    [
        ("x", np.zeros(TOKENS * IN + 1, np.float32), ValueError, "rows of 40 values"),
        ("x", np.zeros((TOKENS + 1, IN), np.float32), ValueError, "expected .* values, found"),
        ("x", np.zeros((TOKENS, IN)), TypeError, "."),
        ("x", np.zeros((TOKENS, IN), np.uint16), ValueError, "type of x"),
        ("x", np.zeros((IN, TOKENS), np.float32).T, ValueError, "x: expected a contiguous array"),
        ("x", unaligned, ValueError, "x: expected an aligned array"),
        ("x", [[0.0] * IN] * TOKENS, TypeError, "."),
        ("x", None, TypeError, "."),
        ("w", np.zeros((OUT, IN - 1), np.float32), ValueError, "weight: expected 960 values, found 936"),
        ("w", np.zeros((OUT, 2 * IN), np.float32)[:, ::2], ValueError, "weight: expected a contiguous array"),
        ("a", np.zeros((RANK, IN), np.float32), ValueError, "a: expected 280 values, found 120"),
        ("a", np.zeros((RANK + HEADS, IN)), TypeError, "."),
        ("b", np.zeros((OUT, HEADS), np.float32), ValueError, "b: expected 288 values, found 96"),
        ("b", np.zeros((HEADS * RANK, OUT), np.float32).T, ValueError, "b: expected a contiguous array"),
        ("state", np.zeros((TOKENS, 1), np.float32), ValueError, "state: expected 91 values, found 13"),
        ("dropout", (float("nan"), 0), ValueError, "dropout: expected a probability, found NaN"),
        ("dropout", (1.5, 0), ValueError, "dropout"),
        ("labels", np.zeros(TOKENS - 1, np.uint32), ValueError, "labels: expected 13 values, found 12"),
        ("labels", np.zeros(TOKENS, np.int64), TypeError, "."),
    ],
)
@pytest.mark.parametrize("which", ["forward", "backward"])
def test_what_does_not_fit_is_refused(which, name, value, error, text):
    case = Case()
    case.forward()
    setattr(case, name, value)
    with pytest.raises(error, match=text):
        getattr(case, which)()


@pytest.mark.parametrize(
    "which, name, value, error, text",
    [
        ("forward", "y", np.zeros((TOKENS, OUT + 1), np.float32), ValueError, "y: expected 312 values, found 325"),
        ("forward", "y", np.zeros((TOKENS, OUT), np.uint16), ValueError, "y: expected the type of x"),
        ("forward", "y", np.zeros((OUT, TOKENS), np.float32).T, ValueError, "y: expected a contiguous array"),
        ("forward", "y", read_only, (TypeError, ValueError), "."),
        ("backward", "dy", np.zeros((TOKENS, OUT), np.uint16), ValueError, "dy: expected the type of x"),
        ("backward", "dy", np.zeros((TOKENS - 1, OUT), np.float32), ValueError, "dy: expected 312 values, found 288"),
        ("backward", "dx", np.zeros(IN, np.float32), ValueError, "dx: expected 520 values, found 40"),
        ("backward", "dx", unaligned, ValueError, "dx: expected an aligned array"),
        ("backward", "da", np.zeros((RANK, IN), np.float32), ValueError, "da: expected 280 values, found 120"),
        ("backward", "db", np.zeros((OUT, HEADS * RANK)), TypeError, "."),
    ],
)
def test_outputs_that_do_not_fit_are_refused(which, name, value, error, text):
    case = Case()
    case.forward()
    setattr(case, name, value)
    with pytest.raises(error, match=text):
        getattr(case, which)()


def test_labels_that_are_no_heads_are_refused():
    for labels, text in [(None, "labels is null"), (np.full(TOKENS, HEADS, np.uint32), "head 4 of 4")]:
        case = Case("label", labels)
        for call in (case.forward, case.backward):
            with pytest.raises(ValueError, match=text):
                call()


def test_one_array_for_input_and_output_is_refused():
    case = Case()
    case.forward()
    case.dx = case.x
    with pytest.raises((TypeError, ValueError)):
        case.backward()


def test_settings():
    for changed, error, text in [
        ({"gate": "door"}, ValueError, "gate"),
        ({"gate": "\ud800"}, (TypeError, ValueError), "."),
        ({"rank": 0}, ValueError, "sizes"),
        ({"d_in": 2**40}, ValueError, "sizes"),
        ({"d_out": -1}, ValueError, "d_out -1: expected 0 to"),
        ({"threads": -1}, ValueError, "threads -1: expected 0 to"),
        ({"top_k": -1}, ValueError, "top_k -1: expected 0 to"),
        ({"top_k": 0}, ValueError, "top_k 0: expected at least 1"),
        ({"scale": "1"}, TypeError, "."),
    ]:
        with pytest.raises(error, match=text):
            Layer(settings(**changed))
    with pytest.raises(KeyError):
        Layer({})
    for changed, text in [({"scale": float("nan")}, "scale"), ({"temperature": float("nan")}, "temperature")]:
        case = Case()
        case.layer = Layer(settings(**changed))
        with pytest.raises(ValueError, match=text):
            case.forward()
