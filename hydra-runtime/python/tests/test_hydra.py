"""Models, adapters, training and evaluation, with NumPy alone."""

import ast
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import hydra

from conftest import tensors

EXAMPLES = [("Name the capital of France.", " Paris."), ("Which of these is a fish?", " Tope.")]


def test_logits_are_pytorchs(model, adapter, golden):
    arrays = tensors(golden / "golden.safetensors")
    logits, want = model.logits(arrays["ids.2"], adapter=adapter), arrays["logits.2"]
    assert logits.dtype == np.float32 and logits.shape == want.shape
    np.testing.assert_allclose(logits, want, atol=1e-4 * np.abs(want).max())


def test_ten_steps_are_pytorchs(model, adapter, golden):
    arrays = tensors(golden / "golden.safetensors")
    examples = [(arrays[f"ids.{i}"], arrays[f"targets.{i}"]) for i in range(6)]
    assert hydra.evaluate(model, examples, adapter=adapter).loss == pytest.approx(arrays["loss"], rel=1e-5)
    options = {"adapter": adapter, "epochs": 10, "batch_size": 6, "lr": 1e-3, "schedule": "constant", "warmup": 0}
    losses = hydra.finetune(model, examples, clip=None, **options).losses
    np.testing.assert_allclose(losses, arrays["trajectory"], rtol=1e-4)


def test_texts_there_and_back(model):
    ids = model.encode("Tope or rope")
    assert ids.dtype == np.uint32 and model.decode(ids) == "Tope or rope"
    assert model.decode(ids.astype(np.int64)) == model.decode(list(ids)) == "Tope or rope"
    assert model.config["vocab"] == 512 and model.eos == 1


def unaligned(values, dtype):
    """An array whose memory begins one byte beside where its type's should."""
    array = np.frombuffer(b" " + np.array(values, dtype).tobytes(), dtype, offset=1)
    assert not array.flags.aligned
    return array


def test_arrays_that_are_not_aligned(model):
    ids = [1, 2, 3, 4]
    records = np.zeros(4, [("small", np.uint8), ("id", np.uint32)])
    records["id"] = ids
    for array in (unaligned(ids, np.uint32), unaligned(ids, np.int64), records["id"]):
        np.testing.assert_array_equal(model.logits(array), model.logits(ids))
        assert model.decode(array) == model.decode(ids)
    loss = hydra.evaluate(model, [(ids, np.array([2, 3, 4, -1]))])
    assert hydra.evaluate(model, [(unaligned(ids, np.uint32), unaligned([2, 3, 4, -1], np.int64))]) == loss


def test_generation(model, adapter):
    options = {"adapter": adapter, "temperature": 0.9, "seed": 3, "max_tokens": 20}
    text = model.generate("Name", **options)
    assert text and text == hydra.generate(model, "Name", **options)
    stream = model.stream("Name", **options)
    assert "".join(stream) == text and 0 < len(stream.tokens) <= 20
    assert model.generate(model.encode("Name", begins=True), **options) == text
    stop = text[2:4]
    assert model.generate("Name", **options, stop=stop) == text[: text.index(stop)]
    assert model.generate("Name", temperature=0.9, seed=3, max_tokens=20) != text
    greedy = model.generate("Name", adapter=adapter, max_tokens=20)
    for only in [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}]:
        assert model.generate("Name", **options, **only) == greedy
    for penalty in ["repetition_penalty", "presence_penalty", "frequency_penalty"]:
        assert model.generate("Name", adapter=adapter, max_tokens=20, **{penalty: 2.0}) != greedy
    with pytest.raises(hydra.Error, match="chat template"):
        model.generate([{"role": "user", "content": "Name"}])


def test_a_model_in_memory(model, golden):
    files = {path.name: path.read_bytes() for path in (golden / "model").iterdir()}
    np.testing.assert_array_equal(hydra.Model(files).logits([1, 2, 3]), model.logits([1, 2, 3]))


def test_finetune_save_load_evaluate(model, tmp_path):
    seen = []
    trained = hydra.finetune(
        model, EXAMPLES, epochs=15, batch_size=2, lr=1e-2, callback=lambda step, loss: seen.append((step, loss))
    )
    assert [step for step, _ in seen] == list(range(1, 16))
    np.testing.assert_array_equal([loss for _, loss in seen], trained.losses)
    before, after = hydra.evaluate(model, EXAMPLES), hydra.evaluate(model, EXAMPLES, adapter=trained.adapter)
    assert before.loss == pytest.approx(trained.losses[0], rel=1e-5) and after.loss < 0.7 * before.loss
    assert after.loss == pytest.approx(after.nll.sum() / after.targets.sum())

    trained.adapter.save(tmp_path / "adapter")
    loaded = model.load_adapter(tmp_path / "adapter")
    assert hydra.evaluate(model, EXAMPLES, adapter=loaded).loss == after.loss
    again = hydra.finetune(model, EXAMPLES, epochs=15, batch_size=2, lr=1e-2)
    for (name, one), (other_name, other) in zip(trained.adapter.tensors(), again.adapter.tensors()):
        assert name == other_name
        np.testing.assert_array_equal(one, other)


def test_a_loop_of_ones_own(model):
    trainer = hydra.Trainer(model, model.init_adapter(dropout=0.0), clip=None)
    steps = [trainer.step(EXAMPLES, 1e-2, router_lr=1e-3) for _ in range(3)]
    before = hydra.evaluate(model, EXAMPLES)
    assert steps[0].loss == pytest.approx(before.loss) and steps[0].targets == before.targets.sum() < steps[0].tokens
    assert trainer.steps == 3 and steps[2].loss < steps[0].loss and steps[0].grad_norm > 0.0
    assert hydra.evaluate(model, EXAMPLES, adapter=trainer.adapter()).loss < steps[2].loss
    with pytest.raises(TypeError, match="an example"):
        trainer.step(["Nine heads?"], 1e-2)


def test_a_loss_that_is_not_finite_takes_the_last_step_back(model):
    trainer = hydra.Trainer(model, model.init_adapter(dropout=0.0), max_tokens=64, clip=None)
    adapters = []
    with pytest.raises(ArithmeticError, match="loss is NaN"):
        for rate in (1e-3, 1e10, 1e18):
            adapters.append(trainer.adapter())
            trainer.step([(list(range(1, 40)), 2)], rate)
    assert trainer.steps == 1 and len(adapters) == 3
    for (_, now), (_, then) in zip(trainer.adapter().tensors(), adapters[1].tensors()):
        np.testing.assert_array_equal(now, then)


def test_targets_as_arrays_are_the_same(model):
    (prompt, answer), *_ = EXAMPLES
    tokens = np.concatenate([model.encode(prompt, begins=True), model.encode(answer), [model.eos]]).astype(np.int64)
    targets = np.full(len(tokens), -100)
    first = len(model.encode(prompt, begins=True)) - 1
    targets[first:-1] = tokens[first + 1 :]
    wanted = hydra.evaluate(model, EXAMPLES[:1])
    for second in (targets, targets.astype(np.int32), list(targets), first + 1, np.int32(first + 1)):
        assert hydra.evaluate(model, [(tokens, second)]) == wanted


def test_adapters(model, adapter, golden):
    assert adapter.config["method"] == "hydra" and adapter.config["lora_heads"] == 2
    assert adapter.config["scale"] == 2.0 and not adapter.config["rslora"]
    arrays = tensors(golden / "adapter" / "adapter_model.safetensors")
    for name, values in adapter.tensors():
        np.testing.assert_array_equal(values, arrays.pop(name))
    assert not arrays
    alone = hydra.Adapter.load(golden / "adapter")
    assert alone.parameters == adapter.parameters
    a, b = alone.pair(1, "down_proj")
    assert a.shape == (3 + 2, 72) and b.shape == (32, 6) and alone.pair(7, "down_proj") is None
    lora = model.init_adapter(method="lora", rank=2, targets=["q_proj", "v_proj"], seed=5)
    assert lora.config["lora_heads"] == 1 and lora.config["targets"] == ["q_proj", "v_proj"]


def test_what_a_new_adapter_is_asked_for_is_what_it_has(model, tmp_path):
    asked = {"head_dropout": 0.25, "temperature": 0.5, "top_k": 2, "load_balance": 0.125}
    plain, sparse = model.init_adapter(seed=3), model.init_adapter(**asked, seed=3)
    assert asked.items() <= sparse.config.items()
    assert [plain.config[key] for key in asked] == [0.0, 1.0, None, 0.0]
    sparse.save(tmp_path)
    assert model.load_adapter(tmp_path).config == sparse.config
    # From the same start, two heads for each token are trained to something else than all of them.
    losses = [hydra.finetune(model, EXAMPLES, adapter=one, epochs=3, lr=1e-2).losses[-1] for one in (plain, sparse)]
    assert losses[0] != losses[1]


def test_a_head_alone_is_the_label_gates(model, tmp_path):
    start = model.init_adapter(gate="label", lora_heads=2, labels=["cities", "fish"], seed=4)
    labelled = [(*example, head) for head, example in enumerate(EXAMPLES)]
    trained = hydra.finetune(model, labelled, adapter=start, epochs=3, lr=1e-2).adapter
    for example, head in zip(labelled, (0, 1)):
        alone = trained.head(head)
        assert alone.config["method"] == "lora" and alone.config["lora_heads"] == 1 and not alone.config["labels"]
        wanted = hydra.evaluate(model, [example], adapter=trained).loss
        assert hydra.evaluate(model, [example[:2]], adapter=alone).loss == pytest.approx(wanted, rel=1e-5)
        assert hydra.evaluate(model, [example[:2]], adapter=trained).loss != pytest.approx(wanted, rel=1e-5)
    alone.save(tmp_path)
    assert model.generate("Which", adapter=alone) == model.generate("Which", adapter=model.load_adapter(tmp_path))
    for head in (2, -1):
        with pytest.raises(ValueError, match=f"head {head}"):
            trained.head(head)


def test_wrong_arguments(model, adapter, tmp_path):
    for call, error, text in [
        (lambda: hydra.Model("no/such/model"), FileNotFoundError, "no/such/model"),
        (lambda: hydra.Model(tmp_path), ValueError, "no config.json"),
        (lambda: hydra.Model(b"GGUF"), ValueError, "<memory>"),
        (lambda: hydra.Model(tmp_path, precision="f8"), ValueError, "precision"),
        (lambda: hydra.Model(tmp_path, device="tpu"), ValueError, "device"),
        (lambda: hydra.Model(tmp_path, device="cuda:1"), ValueError, "without CUDA"),
        (lambda: model.load_adapter(tmp_path), ValueError, "not an adapter folder"),
        (lambda: model.load_adapter(tmp_path / "absent"), FileNotFoundError, "absent"),
        (lambda: model.init_adapter(method="lorax"), ValueError, "method"),
        (lambda: model.init_adapter(targets=["z_proj"]), ValueError, "z_proj"),
        (lambda: model.init_adapter(alpha=float("nan")), ValueError, "alpha"),
        (lambda: model.init_adapter(head_dropout=1.0), ValueError, "head dropout 1"),
        (lambda: model.init_adapter(temperature=0.0), ValueError, "router temperature 0"),
        (lambda: model.init_adapter(top_k=5), ValueError, "top-k 5: expected 1 to 4"),
        (lambda: model.init_adapter(top_k=0), ValueError, "top-k 0"),
        (lambda: model.init_adapter(top_k=-1), ValueError, "^top_k -1: "),
        (lambda: model.init_adapter(gate="uniform", temperature=2.0), ValueError, "needs a router"),
        (lambda: model.generate("a", temperature=float("nan")), ValueError, "temperature"),
        (lambda: model.generate("a", max_tokens=-1), ValueError, "max_tokens -1"),
        (lambda: model.generate("a", top_k=-1), ValueError, "top_k -1"),
        (lambda: model.generate("a", min_p=2), ValueError, "min-p 2"),
        (lambda: model.generate("z" * 4000), ValueError, "tokens"),
        (lambda: model.generate(3.5), TypeError, "."),
        (lambda: model.logits([]), ValueError, "without tokens"),
        (lambda: model.logits([512]), ValueError, "512"),
        (lambda: model.logits(np.array([-1])), ValueError, "-1"),
        (lambda: hydra.Model(tmp_path, threads=-1), ValueError, "^threads -1: expected 0 to"),
        (lambda: model.decode([-1]), ValueError, "^token id -1: expected 0 to 4294967295$"),
        (lambda: model.decode([2**40]), ValueError, "^token id 1099511627776: "),
        (lambda: model.generate([1, -1]), ValueError, "^token id -1: "),
        (lambda: model.init_adapter(seed=-1), ValueError, "^seed -1: expected 0 to 18446744073709551615$"),
        (lambda: model.init_adapter(rank=-1), ValueError, "^rank -1: "),
        (lambda: adapter.pair(-1, "q_proj"), ValueError, "^layer -1: "),
        (lambda: hydra.finetune(model, EXAMPLES, adapter=adapter, seed=-1), ValueError, "^seed -1: "),
        (lambda: hydra.finetune(model, EXAMPLES, max_tokens=-1), ValueError, "^max_tokens -1: "),
        (lambda: hydra.evaluate(model, EXAMPLES, max_tokens=2**70), ValueError, "^max_tokens 1180591620717411303424: "),
        (lambda: hydra.evaluate(model, [("a", "b", -1)]), ValueError, "^head -1: "),
        (lambda: model.generate("a", adapter="adapter"), TypeError, "."),
        (lambda: hydra.finetune(model, []), ValueError, "no examples"),
        (lambda: hydra.finetune(model, EXAMPLES, lr=float("nan")), ValueError, "NaN"),
        (lambda: hydra.finetune(model, EXAMPLES, schedule="step"), ValueError, "schedule"),
        (lambda: hydra.finetune(model, [("a", [1])]), TypeError, "two texts"),
        (lambda: hydra.finetune(model, ["ab"]), TypeError, "an example: expected two texts"),
        (lambda: hydra.evaluate(model, [("a", "b", 0, 1)]), TypeError, "an example: expected two texts"),
        (lambda: hydra.evaluate(model, [([1, 2], np.array([2]))]), ValueError, "targets"),
        (lambda: hydra.evaluate(model, [([1, 2], np.array([1.7, -1]))]), ValueError, "whole numbers .* float64"),
        (lambda: hydra.evaluate(model, [([1, 2], [True, False])]), ValueError, "whole numbers .* bool"),
        (lambda: hydra.evaluate(model, [([1, 2], [[2, 3]])]), ValueError, "whole numbers .* 2 dimensions"),
        (lambda: hydra.evaluate(model, [([1, 2], np.array([2**64 - 1, 3], np.uint64))]), ValueError, "no token id"),
        (lambda: hydra.evaluate(model, [([1, 2], 3)]), ValueError, "a prompt of 3 tokens in a sequence of 2"),
        (lambda: hydra.evaluate(model, [([1, 2], -1)]), ValueError, "a prompt's length -1"),
        (lambda: hydra.evaluate(model, EXAMPLES, max_tokens=2), ValueError, "2"),
    ]:
        with pytest.raises(error, match=text):
            call()


def test_text_that_is_not_unicode(model, adapter, tmp_path):
    """A lone surrogate, which Python's strings may have, and UTF-8 has not."""
    bad, wrong = "a\ud800", (TypeError, ValueError)  # UnicodeEncodeError is a ValueError
    for call, error in [
        (lambda: model.encode(bad), wrong),
        (lambda: model.generate(bad), wrong),
        (lambda: model.stream(bad), wrong),
        (lambda: model.generate("a", stop=bad), wrong),
        (lambda: model.generate("a", stop=["b", bad]), wrong),
        (lambda: model.generate([{"role": "user", "content": bad}]), wrong),
        (lambda: model.generate([{"role": bad, "content": "a"}]), wrong),
        (lambda: model.generate([{bad: "user", "content": "a"}]), wrong),
        (lambda: hydra.finetune(model, [(bad, "a")]), wrong),
        (lambda: hydra.evaluate(model, [("a", bad)]), wrong),
        (lambda: model.init_adapter(gate="label", labels=[bad]), wrong),
        (lambda: model.init_adapter(targets=[bad]), wrong),
        (lambda: hydra.Model(bad), wrong),
        (lambda: hydra.Model({bad: b""}), wrong),
        (lambda: hydra.Model(tmp_path, device=bad), wrong),
        (lambda: hydra.Adapter.load(bad), wrong),
        (lambda: model.load_adapter(bad), wrong),
        (lambda: adapter.save(bad), wrong),
        # Python's own way to write a byte that is not UTF-8: a path, and here one of nothing.
        (lambda: hydra.Model("no-such-\udcff"), FileNotFoundError),
    ]:
        with pytest.raises(error, match="."):
            call()


def test_the_published_adapters_form(model, adapter, golden, tmp_path):
    """The published implementation's files have none of the keys that are Hydra's own."""
    config = json.loads((golden / "adapter" / "adapter_config.json").read_text())
    for key in ("method", "gate", "labels"):
        config.pop(key, None)
    assert config["lora_nums"] == 2
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    shutil.copy(golden / "adapter" / "adapter_model.safetensors", tmp_path)
    alone, fitted = hydra.Adapter.load(tmp_path), model.load_adapter(tmp_path)
    for loaded in (alone, fitted):
        assert {**adapter.config, "labels": []} == loaded.config
        for (name, one), (other_name, other) in zip(adapter.tensors(), loaded.tensors()):
            assert name == other_name
            np.testing.assert_array_equal(one, other)
        for target in config["target_modules"]:
            for one, other in zip(adapter.pair(1, target), loaded.pair(1, target)):
                np.testing.assert_array_equal(one, other)
        tokens = [0, 5, 9, 300]
        np.testing.assert_array_equal(model.logits(tokens, adapter=loaded), model.logits(tokens, adapter=adapter))


def test_other_threads_go_on(model):
    """The GIL is free while the model works."""
    counted, done = 0, threading.Event()

    def work():
        hydra.finetune(model, [("a b c d " * 8, "e f g h " * 8)] * 8, epochs=20)
        done.set()

    worker = threading.Thread(target=work)
    worker.start()
    while not done.is_set():
        counted += 1
        time.sleep(0.001)
    worker.join()
    assert counted > 20


def test_the_readmes_example(golden, tmp_path, monkeypatch, capsys):
    readme = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
    example = readme.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(example.replace('"smollm2"', repr(str(golden / "model"))), {})
    steps = capsys.readouterr().out.splitlines()
    assert steps[0].startswith("1 ") and steps[19].startswith("20 ")


def test_the_stubs_name_what_there_is():
    """Each class and function of the native module, and each of their names, is in _hydra.pyi, and the reverse."""
    native = hydra._hydra
    stubs = ast.parse((pathlib.Path(hydra.__file__).parent / "_hydra.pyi").read_text())
    wanted = {}
    for node in stubs.body:
        if isinstance(node, ast.ClassDef):
            functions = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
            fields = {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
            wanted[node.name] = functions | fields
        elif isinstance(node, ast.FunctionDef):
            wanted[node.name] = set()
    found = {name: getattr(native, name) for name in dir(native) if not name.startswith("__")}
    assert set(found) == set(wanted)
    for name, value in found.items():
        if isinstance(value, type) and not issubclass(value, Exception):
            unlisted = {"__doc__", "__module__", "__new__"}
            assert set(vars(value)) - unlisted == wanted[name] - unlisted, name


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_ends_long_work(golden):
    program = f"""
import hydra, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background may have been told to ignore it
model = hydra.Model({str(golden / "model")!r})
examples = [(list(range(2, 250)), 0)] * 4000
examples = [(tokens, __import__("numpy").array(tokens)) for tokens, _ in examples]
print("ready", flush=True)
try:
    hydra.evaluate(model, examples)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    time.sleep(0.3)
    child.send_signal(signal.SIGINT)
    started = time.monotonic()
    assert child.communicate(timeout=60)[0] == "interrupted\n"
    assert child.returncode == 0 and time.monotonic() - started < 30
