#!/usr/bin/env python3
"""Writes the adapters beside it with HF PEFT, and what the model of tests/golden/hydra computes with each in f32 on one thread.

    python make_cases.py [OUT] [--seed 1]

Needs torch, transformers, peft and safetensors (from PyPI). A case is the folder that `save_pretrained` wrote, and golden.safetensors:
ids [tokens] and the logits [tokens, vocab] after `PeftModel.from_pretrained` has read the folder. Further cases, of other seeds, are
tested where HYDRA_PEFT names the folder OUT.
"""
import argparse, json, shutil, sys, tempfile
from pathlib import Path
import peft, torch, transformers
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
BASE = HERE / "../../../../tests/golden/hydra/model"
PATTERNS = dict(
    r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"],
    rank_pattern={"down_proj": 2, "model.layers.0.self_attn.q_proj": 7, r"^model\.layers\.1\.self_attn\.(q|v)_proj": 3},
    alpha_pattern={"o_proj": 3, "layers.1.mlp.down_proj": 20, "(q|v)_proj": 5})
CASES = dict(
    patterns=PATTERNS,
    rslora=dict(PATTERNS, use_rslora=True),
    layers=dict(r=3, lora_alpha=4, target_modules=["k_proj", "up_proj"], layers_to_transform=[1], layers_pattern="layers"),
    expression=dict(r=2, lora_alpha=3, fan_in_fan_out=True,
                    target_modules=r".*\.layers\.(0\.self_attn\.(q|o)|1\.mlp\.(?!up)[a-z]+)_proj", rank_pattern={"o_proj": 5}),
    paths=dict(r=2, lora_alpha=2, target_modules=["model.layers.0.mlp.down_proj", "1.self_attn.v_proj", "gate_proj", "k_proj"],
               layers_to_transform=1, exclude_modules=r".*1\.mlp\.gate_proj"),
    linear=dict(r=2, lora_alpha=1, target_modules="all-linear", exclude_modules=["0.mlp.up_proj", "v_proj"],
                alpha_pattern={"mlp.*": 6}),
    pissa=dict(r=2, lora_alpha=3, target_modules=["q_proj"], init_lora_weights="pissa"),
)
TYPES = dict(linear=torch.bfloat16, layers=torch.float64, paths=torch.float16)


def base():
    return transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, attn_implementation="eager").eval()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", nargs="?", type=Path, default=HERE)
    parser.add_argument("--seed", type=int, default=1)
    a = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for name, options in CASES.items():
        torch.manual_seed(a.seed)
        out = a.out / name
        shutil.rmtree(out, ignore_errors=True)
        model = peft.get_peft_model(base(), peft.LoraConfig(task_type="CAUSAL_LM", **options))
        how = {}
        if name == "pissa":
            start = tempfile.mkdtemp()
            model.peft_config["default"].init_lora_weights = True
            model.save_pretrained(start)
            model.peft_config["default"].init_lora_weights = "pissa"
            how["path_initial_model_for_weight_conversion"] = start
        for key, values in model.named_parameters():
            if "lora_" in key:
                values += 0.2 * torch.randn_like(values)
        ids = torch.randint(2, 512, (5,))
        trained = model(ids[None]).logits[0]
        model.save_pretrained(out, **how)
        (out / "README.md").unlink()
        config = json.loads((out / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "hydra"
        if isinstance(config["target_modules"], list):
            config["target_modules"].sort()  # PEFT has a set
        (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if name in TYPES:
            file = out / "adapter_model.safetensors"
            save_file({key: values.to(TYPES[name]) for key, values in load_file(file).items()}, file, {"format": "pt"})
        read = peft.PeftModel.from_pretrained(base(), out).eval()
        logits = read(ids[None]).logits[0]
        if name not in TYPES:
            assert (logits - trained).abs().max() < 1e-4, name
        save_file(dict(ids=ids, logits=logits.contiguous()), out / "golden.safetensors")


if __name__ == "__main__":
    sys.exit(main())
