"""``hydra.torch`` against PyTorch's own operations; with HYDRA_TEST_TORCH=1."""

import copy
import json
import os
import pickle
import shutil

import numpy as np
import pytest

if os.environ.get("HYDRA_TEST_TORCH") != "1":
    pytest.skip("needs PyTorch: set HYDRA_TEST_TORCH=1", allow_module_level=True)

import torch
from torch import nn
from torch.nn import functional as F

from hydra.torch import HydraLinear, _array, _plain, inject

from conftest import tensors


def reference(layer, x, mask=None):
    """What the layer computes, in PyTorch's operations."""
    rank, heads = layer.settings["rank"], layer.settings["lora_heads"]
    a_rows = rank * heads if layer.settings["per_head_a"] else rank
    down = F.linear(x if mask is None else x * mask, layer.a[:a_rows])
    down = down.unflatten(-1, (heads, rank)) if layer.settings["per_head_a"] else down.unsqueeze(-2)
    gate = layer.settings["gate"]
    if gate == "router":
        weights = torch.softmax(F.linear(x, layer.a[a_rows:]) / layer.settings["temperature"], -1)
    elif gate == "label":
        hot = F.one_hot(layer.labels.clamp(min=0), heads).to(x.dtype)
        weights = torch.where(layer.labels.unsqueeze(-1) < 0, torch.full_like(hot, 1 / heads), hot)
    else:
        weights = torch.full((*x.shape[:-1], heads), 1 / heads if gate == "uniform" else 1.0, dtype=x.dtype)
    mixed = (weights.unsqueeze(-1) * down).flatten(-2)
    y = F.linear(x, layer.weight.to(x.dtype)) + layer.settings["scale"] * F.linear(mixed, layer.b)
    return y if layer.bias is None else y + layer.bias


def close(what, got, want, tolerance):
    difference = (got.double() - want.double()).abs().max() / want.double().abs().max()
    print(f"{what}: {difference:.1e}")
    assert difference < tolerance, f"{what} differs by {difference:.1e} of its largest value"


def layer(**settings):
    torch.manual_seed(1)
    made = HydraLinear.wrap(nn.Linear(96, 130), **{"rank": 3, "lora_heads": 4, "alpha": 6.0, **settings})
    nn.init.normal_(made.b, std=0.1)
    return made


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"gate": "uniform"},
        {"gate": "one", "lora_heads": 1},
        {"gate": "label"},
        {"gate": "label", "per_head_a": True},
        {"threads": 3},
    ],
)
@pytest.mark.parametrize("shape", [(2, 50, 96), (3, 96), (96,)])
def test_gradients_are_autograds(settings, shape):
    made = layer(**settings)
    made.labels = torch.arange(int(np.prod(shape[:-1]))).reshape(shape[:-1]) % 5 - 1
    results = []
    for run in (made, lambda x: reference(made, x)):
        torch.manual_seed(2)
        x = torch.randn(shape, requires_grad=True)
        y = run(x)
        made.zero_grad()
        (y * torch.randn(y.shape)).sum().backward()
        results.append([y.detach(), x.grad, made.a.grad.clone(), made.b.grad.clone()])
    for what, got, want in zip(["y", "dx", "da", "db"], *results):
        close(what, got, want, 1e-4)


def test_weights_of_16_bits_are_read_in_place():
    for dtype in (torch.float16, torch.bfloat16):
        made = layer()
        narrow = HydraLinear(made.weight.to(dtype), rank=3, lora_heads=4, alpha=6.0)
        narrow.load_state_dict(made.state_dict())
        x = torch.randn(9, 96)
        close("y", narrow(x).detach(), reference(narrow, x).detach(), 1e-5)


def test_a_layer_that_changes_its_type():
    x = torch.randn(9, 96)
    for before in (torch.float32, torch.float16, torch.bfloat16):
        for after in (torch.float32, torch.float16, torch.bfloat16):
            made = layer()
            made.weight = made.weight.to(before)
            want = made(x).detach()
            close(f"{before} to {after}", made.to(after)(x).detach(), want, 2e-2)
    with pytest.raises(ValueError, match="the weight is torch.float64"):
        layer().double()(x)


@pytest.mark.parametrize("dtype, device", [("float64", "cpu"), ("bfloat16", "cpu"), ("float32", "meta")])
def test_other_defaults_change_nothing(dtype, device):
    linear, x = nn.Linear(96, 130), torch.randn(9, 96, requires_grad=True)
    results = []
    try:
        for changed in (False, True):
            if changed:
                torch.set_default_dtype(getattr(torch, dtype))
                torch.set_default_device(device)
            torch.manual_seed(3)
            made = HydraLinear.wrap(linear, dropout=0.5)
            assert made.a.dtype == made.b.dtype == torch.float32
            made.b.data.copy_(made.a.new_ones(()) / 8)
            y, x.grad = made(x), None
            y.sum().backward()
            results.append([y, x.grad, made.a.grad])
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for one, other in zip(*results):
        assert torch.equal(one, other)


def test_bf16_in_place_and_products():
    made = layer(products="bf16")
    made.weight = made.weight.to(torch.bfloat16)
    x = torch.randn(40, 96).to(torch.bfloat16).requires_grad_()
    y = made(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    own = x.detach().float().requires_grad_()
    made.zero_grad()
    want = reference(made, own)
    close("y", y.detach(), want.detach(), 3e-2)
    want.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    close("dx", x.grad, own.grad, 3e-2)


def test_memory_is_shared_where_it_can_be():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tensor = torch.randn(4, 6).to(dtype)
        assert _array(tensor).__array_interface__["data"][0] == tensor.data_ptr()
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.randn(4, 6).to(dtype)
        assert _plain(tensor) is tensor and _plain(tensor.T) is not tensor


def test_what_is_not_contiguous_is_copied():
    made = layer()
    x = torch.randn(96, 20).T
    close("y", made(x).detach(), reference(made, x).detach(), 1e-5)
    double = x.double()
    assert made(double).dtype == torch.float64
    close("y", made(double).detach(), reference(made, x).detach(), 1e-5)


def test_dropout_is_drawn_again_in_the_backward_pass():
    made = layer(dropout=0.3)
    x = torch.eye(96).requires_grad_()
    y = made.train()(x)
    y.sum().backward()
    # Each row of x is a unit vector, whose value is kept or dropped: the adapter's part is scaled by 1 / 0.7 or is 0.
    with torch.no_grad():
        down = y - F.linear(x, made.weight, made.bias)
        whole = reference(made, x) - F.linear(x, made.weight, made.bias)
        share = (down / whole).median(-1).values
    kept = share > 0.5
    assert torch.allclose(share[kept], torch.tensor(1 / 0.7), rtol=1e-2) and (share[~kept].abs() < 1e-2).all()
    assert 0.5 < kept.float().mean() < 0.9
    mask = torch.ones(96, 96)
    mask[torch.arange(96), torch.arange(96)] = kept / 0.7
    assert made.eval()(x).allclose(reference(made, x), atol=1e-5)


def test_gradients_of_gradients_are_refused():
    x = torch.randn(5, 96, requires_grad=True)
    (dx,) = torch.autograd.grad(layer()(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.square().sum().backward()


def test_gradients_that_are_not_needed():
    made = layer()
    made.a.requires_grad_(False)
    x = torch.randn(10, 96)
    made(x).sum().backward()
    assert made.a.grad is None and made.b.grad is not None
    made.b.requires_grad_(False)
    x.requires_grad_()
    made(x).sum().backward()
    assert x.grad is not None


def test_training_lowers_the_loss_and_state_is_kept(tmp_path):
    made = layer()
    x, y = torch.randn(64, 96), torch.randn(64, 130)
    optimizer, losses = torch.optim.AdamW(made.parameters(), lr=1e-2), []
    for _ in range(30):
        loss = F.mse_loss(made(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(other(x), made(x))
    fresh = layer()
    assert set(made.state_dict()) == {"a", "b"}
    fresh.load_state_dict(made.state_dict())
    assert torch.equal(fresh(x), made(x))


class Block(nn.Module):
    """A LLaMA's block, as transformers name its parts."""

    def __init__(self, config):
        super().__init__()
        d, kv = config["d_model"], config["kv_heads"] * config["head_dim"]
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for name, out in [("q_proj", d), ("k_proj", kv), ("v_proj", kv), ("o_proj", d)]:
            setattr(self.self_attn, name, nn.Linear(d, out, bias=False))
        for name, size in [
            ("gate_proj", (d, config["d_ffn"])),
            ("up_proj", (d, config["d_ffn"])),
            ("down_proj", (config["d_ffn"], d)),
        ]:
            setattr(self.mlp, name, nn.Linear(*size, bias=False))


def llama(config):
    module = nn.Module()
    module.model = nn.Module()
    module.model.layers = nn.ModuleList(Block(config) for _ in range(config["layers"]))
    module.lm_head = nn.Linear(config["d_model"], config["vocab"], bias=False)
    return module


def test_an_adapter_is_put_on_a_llama(model, adapter, golden, tmp_path):
    module = llama(model.config)
    linear = module.model.layers[1].mlp.down_proj
    placed = inject(module, golden / "adapter")
    assert len(placed) == 14 and isinstance(module.lm_head, nn.Linear)
    own = module.model.layers[1].mlp.down_proj
    assert own.weight.data_ptr() == linear.weight.data_ptr(), "the weight is shared"
    a, b = adapter.pair(1, "down_proj")
    assert torch.equal(own.a, torch.from_numpy(a)) and torch.equal(own.b, torch.from_numpy(b))
    x = torch.randn(7, 72)
    close("y", own(x).detach(), reference(own, x).detach(), 1e-5)
    assert own.settings["scale"] == pytest.approx(2.0)
    # rsLoRA scales by alpha / sqrt(rank).
    shutil.copytree(golden / "adapter", tmp_path / "rslora")
    path = tmp_path / "rslora" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_rslora": True}))
    assert inject(llama(model.config), tmp_path / "rslora")[0].settings["scale"] == pytest.approx(6 / 3**0.5)
    # A LoRA has one head and no router.
    lora = model.init_adapter(method="lora", targets=["q_proj"])
    assert len(inject(llama(model.config), lora)) == 2
    with pytest.raises(ValueError, match="no linear layer"):
        inject(nn.Sequential(nn.Linear(2, 2)), adapter)
    layers = model.config["layers"]
    for changed, text in [({"d_ffn": 80}, "the adapter is for"), ({"layers": layers - 1}, "no linear layer")] + [
        ({"layers": layers + 1}, f"the adapter is for a model of {layers} layers")
    ]:
        other = llama({**model.config, **changed})
        with pytest.raises(ValueError, match=text):
            inject(other, adapter)
        assert not any(isinstance(part, HydraLinear) for part in other.modules()), "the model is as it was"


@pytest.mark.filterwarnings("error")
def test_what_is_left_out_in_training_is_said(model, golden, tmp_path):
    shutil.copytree(golden / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "head_dropout": 0.25, "load_balance": 0.5}))
    with pytest.warns(UserWarning, match="leaves out the adapter's head_dropout 0.25 and load_balance 0.5"):
        assert len(inject(llama(model.config), tmp_path / "adapter")) == 14
    inject(llama(model.config), golden / "adapter")


def test_logits_and_gradients_of_transformers_llama_are_the_golden_ones(golden):
    transformers = pytest.importorskip("transformers")
    llama = transformers.AutoModelForCausalLM.from_pretrained(golden / "model", dtype=torch.float32)
    llama.requires_grad_(False)
    inject(llama, golden / "adapter")
    arrays = {name: torch.from_numpy(values.copy()) for name, values in tensors(golden / "golden.safetensors").items()}
    close("logits", llama(arrays["ids.2"][None]).logits[0].detach(), arrays["logits.2"], 1e-4)

    # The mean over all targets of six records.
    nll, targets = 0.0, 0
    for i in range(6):
        wanted = arrays[f"targets.{i}"]
        logits = llama(arrays[f"ids.{i}"][None]).logits[0]
        nll = nll + F.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum")
        targets += int((wanted != -100).sum())
    (nll / targets).backward()
    layer = llama.model.layers[1].mlp.down_proj
    prefix = "grad.base_model.model.model.layers.1.mlp.down_proj."
    down, router = arrays[prefix + "lora_A.weight"], arrays[prefix + "lora_route.weight"]
    close("dA and dR", layer.a.grad, torch.cat([down, router]), 1e-4)
    heads = [arrays[f"{prefix}lora_B{e}.weight"] for e in range(2)]
    close("dB", layer.b.grad, torch.cat(heads, 1), 1e-4)


def test_wrong_arguments():
    linear = nn.Linear(8, 8)
    for settings, text in [
        ({"gate": "none"}, "gate"),
        ({"rank": 0}, "rank 0"),
        ({"products": "f8"}, "products"),
    ]:
        with pytest.raises(ValueError, match=text):
            HydraLinear.wrap(linear, **settings)
    with pytest.raises(ValueError, match="matrix"):
        HydraLinear(torch.zeros(8))
    made = HydraLinear.wrap(linear, gate="label")
    with pytest.raises(ValueError, match="labels"):
        made(torch.zeros(2, 8))
    with pytest.raises(ValueError, match="x is on meta: HydraLinear works on the CPU"):
        HydraLinear.wrap(linear)(torch.zeros(2, 8, device="meta"))
    with pytest.raises(ValueError, match="weight is on meta"):
        HydraLinear.wrap(linear).to("meta")(torch.zeros(2, 8))
    with pytest.raises(ValueError, match="rows of 8"):
        HydraLinear.wrap(linear)(torch.zeros(2, 7))
