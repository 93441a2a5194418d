"""PyPI's lm-eval beside `hydra eval mmlu`: lm_eval_peer.py HYDRA MODEL MMLU SCRATCH. `.ci/lm-eval` runs it.

The tasks are lm-eval's own files for MMLU, with a local file of questions in place of its data set on the hub. Both
programs read the same Hugging Face folder in f32. For each question it compares prompts, hashes, log-likelihoods and
answers, for all of them the accuracies and their standard errors. Then lm-eval asks `hydra serve`, one and eight at once.
"""

import contextlib
import csv
import importlib.metadata
import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import lm_eval
import torch
import transformers
from lm_eval.tasks import TaskManager

# Short ones; some questions of the second have lines, and most of the third have spaces around them.
SUBJECTS = ["abstract_algebra", "computer_security", "world_religions"]
QUESTIONS = 30
SHOTS = [0, 5]
# A server is asked four times for each question, and has to answer with the log-probabilities of the whole prompt.
SERVED = 8
CONCURRENT = [1, 8]
# The largest difference of a log-likelihood: sums in f32 in another order, through thirty layers.
TOLERANCE = 1e-3
# Contexts of five exemplars are longer than lm-eval's default for servers.
LONGEST = 4096

hydra, model, mmlu, scratch = sys.argv[1], *map(Path, sys.argv[2:])


def questions(subject, split):
    """Rows of MMLU: question, A, B, C, D, letter."""
    lines = mmlu / "mmlu.jsonl"
    if not lines.exists():
        with open(mmlu / split / f"{subject}_{split}.csv", newline="", encoding="utf-8") as file:
            return list(csv.reader(file))
    rows = [row for row in map(json.loads, open(lines, encoding="utf-8")) if row["subject"] == subject]
    rows = [[row["question"], *row["choices"], row["answer"]] for row in rows]
    return rows[-5:] if split == "dev" else rows


def write_questions():
    """The questions for hydra as MMLU's original files, for lm-eval as rows of cais/mmlu with its tasks."""
    tasks = Path(lm_eval.__file__).parent / "tasks/mmlu/default"
    template = (tasks / "_default_template_yaml").read_text().replace("cais/mmlu", "json")
    (scratch / "tasks").mkdir()
    (scratch / "tasks/_default_template_yaml").write_text(template)
    for subject in SUBJECTS:
        files = {}
        for split in ["test", "dev"]:
            rows = questions(subject, split)[: QUESTIONS if split == "test" else 5]
            (scratch / "questions" / split).mkdir(parents=True, exist_ok=True)
            path = scratch / "questions" / split / f"{subject}_{split}.csv"
            with open(path, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(rows)
            files[split] = str(scratch / "tasks" / f"{subject}_{split}.jsonl")
            with open(files[split], "w", encoding="utf-8") as file:
                for question, *choices, answer in rows:
                    row = {"question": question, "subject": subject, "choices": choices}
                    file.write(json.dumps({**row, "answer": "ABCD".index(answer)}) + "\n")
        task = (tasks / f"mmlu_{subject}.yaml").read_text()
        local = f'"dataset_kwargs": {json.dumps({"data_files": files})}'
        name = f'"dataset_name": "{subject}"'
        assert name in task, task
        (scratch / "tasks" / f"mmlu_{subject}.yaml").write_text(task.replace(name, local))
    group = {
        "group": "mmlu",
        "task": [f"mmlu_{subject}" for subject in SUBJECTS],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        "metadata": {"version": 2.0},
    }
    (scratch / "tasks/_mmlu.yaml").write_text(json.dumps(group))


def model_folder():
    """A Hugging Face folder in f32; transformers makes one of a GGUF file."""
    if (model / "config.json").exists():
        return model
    file = next(model.glob("*.gguf")) if model.is_dir() else model
    folder = scratch / "model"
    options = {"gguf_file": file.name}
    transformers.AutoTokenizer.from_pretrained(file.parent, **options).save_pretrained(folder)
    weights = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
    # The blocks are decoded; it would refuse to save them otherwise.
    weights.hf_quantizer = None
    del weights.config.quantization_config
    weights.save_pretrained(folder)
    return folder


def by_lm_eval(kind, shots, limit, **model_args):
    tasks = TaskManager(include_path=str(scratch / "tasks"), include_defaults=False)
    options = {"tasks": ["mmlu"], "num_fewshot": shots, "limit": limit, "task_manager": tasks, "log_samples": True}
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        return lm_eval.simple_evaluate(model=kind, model_args=model_args, **options)


def by_hydra(folder, shots, limit):
    out = scratch / f"hydra-{shots}-{limit}"
    command = [hydra, "eval", "mmlu", "--model", folder, "--data", scratch / "questions", "--style", "lm-eval"]
    options = ["--shots", str(shots), "--limit", str(limit), "--lm-eval", out]
    subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
    results = json.loads((out / "results_hydra.json").read_text())
    samples = {}
    for subject in SUBJECTS:
        lines = (out / f"samples_mmlu_{subject}_hydra.jsonl").read_text().splitlines()
        samples[f"mmlu_{subject}"] = [json.loads(line) for line in lines]
    return {"results": results["results"], "samples": samples}


def compare(name, shots, ours, theirs):
    """Fails unless each question was asked with the same text and answered in the same way."""
    asked, largest = 0, 0.0
    for task, samples in theirs["samples"].items():
        own = sorted(ours["samples"][task], key=lambda sample: sample["doc_id"])
        samples = sorted(samples, key=lambda sample: sample["doc_id"])
        assert len(own) == len(samples), f"{task}: {len(own)} and {len(samples)} questions"
        for one, two in zip(own, samples):
            at = f"{name}, {shots} shots, {task} {one['doc_id']}"
            prompts = [(argument["arg_0"], argument["arg_1"]) for argument in one["arguments"].values()]
            assert prompts == [tuple(prompt) for prompt in two["arguments"]], f"{at}: {prompts} {two['arguments']}"
            for key in ["doc", "doc_hash", "prompt_hash", "target_hash"]:
                assert one[key] == two[key], f"{at}: {key}: {one[key]} and {two[key]}"
            found = [[float(score) for score, _ in sample["filtered_resps"]] for sample in (one, two)]
            greedy = [[str(flag) for _, flag in sample["filtered_resps"]] for sample in (one, two)]
            largest = max(largest, *(abs(a - b) for a, b in zip(*found)))
            answers = [max(range(4), key=scores.__getitem__) for scores in found]
            assert answers[0] == answers[1] and greedy[0] == greedy[1], f"{at}: {found} {greedy}"
            assert one["acc"] == two["acc"], at
            asked += 1
    for task in theirs["samples"].keys() | {"mmlu"}:
        for key in ["acc,none", "acc_stderr,none"]:
            one, two = ours["results"][task][key], theirs["results"][task][key]
            assert abs(one - two) < 1e-9, f"{name}, {shots} shots: {task}: {key}: {one} and {two}"
    assert largest < TOLERANCE, f"{name}, {shots} shots: log-likelihoods differ by {largest:.1e}"
    accuracy = 100 * ours["results"]["mmlu"]["acc,none"]
    same = f"{asked} answers of {asked} are equal, log-likelihoods to {largest:.1e}"
    print(f"{name}, {shots} shots: {accuracy:.2f} %, {same}", flush=True)


def serve(folder):
    """A server of the folder, and its address."""
    command = [hydra, "serve", "--model", folder, "--model-name", "model", "--port", "0", "--ctx", str(LONGEST)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    line = server.stdout.readline()
    assert line.startswith("listening on "), line
    return server, line.split()[-1]


def main():
    write_questions()
    folder = model_folder()
    version = importlib.metadata.version("lm_eval")
    for shots in SHOTS:
        theirs = by_lm_eval("hf", shots, QUESTIONS, pretrained=str(folder), dtype="float32", device="cpu", batch_size=4)
        compare(f"lm-eval {version}, hf", shots, by_hydra(folder, shots, QUESTIONS), theirs)
    server, address = serve(folder)
    try:
        for shots in SHOTS:
            ours = by_hydra(folder, shots, SERVED)
            options = {"model": "model", "base_url": f"{address}/v1/completions"}
            options |= {"tokenizer": str(folder), "max_length": LONGEST}
            for concurrent in CONCURRENT:
                theirs = by_lm_eval("local-completions", shots, SERVED, num_concurrent=concurrent, **options)
                compare(f"lm-eval {version}, local-completions, {concurrent} at once", shots, ours, theirs)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    # A server that lm-eval asks has no key.
    os.environ.pop("OPENAI_API_KEY", None)
    logging.disable(logging.WARNING)
    main()
