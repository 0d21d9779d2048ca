"""Measure the peak memory of training runs whose peaks were predicted before.

    python benchmarks/memory_grid.py predict    # on any machine, then commit the file
    python benchmarks/memory_grid.py [8B 3B/full ...]   # on an NVIDIA GPU of 140 GB

With names of shapes, or of shapes and methods, only those are measured; rows of the
others stay. `predict` writes
benchmarks/memory_grid_predicted.json, the predictions as they stood before any of these
runs was made; the other one writes data/measured/memory_grid.json. Random weights take
the same memory as trained ones. Runs with a cap hold torch to so many GiB: that proves
the fit, not the speed of such a card.
"""

import gc
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

import torch
from bitsandbytes.functional import GlobalPageManager
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoTokenizer, TrainerCallback

from qlora_helpers import embedded, env, fit, memory, models, recorded, train

PREDICTED = pathlib.Path(__file__).with_name("memory_grid_predicted.json")
# The optimizer's states are there from the second step on; more where a step is short,
# so that it can be timed.
STEPS, MORE_STEPS, SHORT = 2, 6, 8192
# (shape, method, tokens of a row, rows, each how-manieth layer is checkpointed)
GRID = [
    ("1B", "qlora", 512, 1, 1),
    ("1B", "qlora", 8192, 8, 1),
    ("1B", "qlora", 2048, 4, 0),
    ("1B", "lora", 1024, 8, 1),
    ("1B", "lora", 2048, 8, 0),
    ("1B", "full", 2048, 2, 1),
    ("1B", "full", 1024, 8, 0),
    ("3B", "qlora", 2048, 2, 1),
    ("3B", "qlora", 8192, 4, 1),
    ("3B", "qlora", 1024, 8, 0),
    ("3B", "lora", 4096, 4, 1),
    ("3B", "lora", 2048, 2, 0),
    ("3B", "full", 2048, 4, 1),
    ("8B", "qlora", 512, 1, 1),
    ("8B", "qlora", 2048, 8, 1),
    ("8B", "qlora", 8192, 8, 1),
    ("8B", "qlora", 2048, 4, 0),
    ("8B", "qlora", 2048, 4, 1),
    ("8B", "qlora", 2048, 4, 2),
    ("8B", "qlora", 4096, 2, 0),
    ("8B", "qlora", 4096, 4, 2),
    ("8B", "lora", 1024, 4, 1),
    ("8B", "lora", 8192, 8, 1),
    ("8B", "lora", 2048, 4, 0),
    ("8B", "full", 1024, 2, 1),
    ("8B", "full", 8192, 2, 1),
    ("13B", "qlora", 512, 4, 1),
    ("13B", "qlora", 4096, 8, 1),
    ("13B", "qlora", 2048, 2, 0),
    ("13B", "lora", 4096, 4, 1),
    ("34B", "qlora", 1024, 1, 1),
    ("34B", "qlora", 8192, 4, 1),
    ("34B", "qlora", 2048, 1, 0),
    ("34B", "lora", 2048, 4, 1),
    ("70B", "qlora", 512, 1, 1),
    ("70B", "qlora", 4096, 8, 1),
    ("70B", "qlora", 1024, 2, 0),
]
# (shape, method, tokens, rows, each, cap in GiB, profile): the headlines
CAPPED = [
    ("65B", "qlora", 512, 1, 1, 48, "bf16"),
    ("70B", "qlora", 512, 1, 1, 48, "bf16"),
    ("13B", "qlora", 1024, 1, 1, 16, "bf16"),
    ("34B", "qlora", 1024, 1, 1, 24, "bf16"),
    ("8B", "qlora", 2048, 1, 1, 15, "fp16"),
]
FIELDS = ("shape", "method", "length", "rows", "every", "cap_gib", "profile")


class StepTimes(TrainerCallback):
    """Seconds of each step but the first, which also finds its kernels and memory.

    A class, since TrainerCallback is one.
    """

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if state.global_step > 1:
            self.seconds.append(time.perf_counter() - self.start)


def runs() -> list[dict]:
    """All runs, the settings of each by name."""
    free = [(*run, None, "bf16") for run in GRID]
    return [dict(zip(FIELDS, run, strict=True)) for run in [*free, *CAPPED]]


def configs(run, machine):
    """What a run trains with, as memory.predict takes it."""
    config, quantization, lora, settings = fit.configs(
        models.llama_config(run["shape"]),
        run["method"],
        run["rows"],
        run["length"],
        run["every"],
        machine,
    )
    short = run["rows"] * run["length"] <= SHORT
    settings.max_steps = MORE_STEPS if short else STEPS
    settings.report_to = []
    return config, quantization, lora, settings


def predict(run) -> dict:
    """A run with its predicted bytes, in GiB."""
    found = memory.predict(*configs(run, env.elsewhere(run["profile"])))
    kinds = {kind: round(size / env.GIB, 4) for kind, size in found.kinds.items()}
    return {
        **run,
        "predicted_gib": round(found.peak / env.GIB, 4),
        "predicted_weights_gib": round(sum(found.weights.values()) / env.GIB, 4),
        "moment": found.moment,
        "kinds_gib": kinds,
    }


def make(run, machine):
    """The model that a run trains: random weights, adapters if the method has any."""
    _, quantization, lora, _ = configs(run, machine)
    model = models.random_llama(run["shape"], quantization)
    return get_peft_model(model, lora) if lora else model.requires_grad_(True)


def trainer_for(model, run, machine):
    """A trainer for a run, over rows of random tokens."""
    settings = configs(run, machine)[3]
    settings.output_dir = str(env.cache_dir() / "benchmark_memory")
    shape = (settings.max_steps * run["rows"], run["length"])
    data = {"input_ids": torch.randint(0, 1000, shape).tolist()}
    tokenizer = AutoTokenizer.from_pretrained(embedded.embedded_dir())
    dataset = Dataset.from_dict(data)
    trainer = train.build_trainer(model, tokenizer, dataset, settings)
    if run["method"] == "full":  # what trains became fp32, which is meant for adapters
        model.to(machine.compute_dtype)
    return trainer


def clean(model=None) -> None:
    """Give back what a run left, so that the next one starts as the first did."""
    for parameter in model.parameters() if model else ():
        parameter.grad = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def managed_tensors():
    """The tensors in managed memory: bitsandbytes keeps a list, and frees none."""
    return GlobalPageManager.get_instance().paged_tensors


def managed_bytes() -> int:
    """Bytes in managed memory."""
    return sum(tensor.nbytes for tensor in managed_tensors())


def measure(run, model, machine) -> dict:
    """Train a run; its row."""
    memory.hold_to(run["cap_gib"])
    times = StepTimes()
    try:
        trainer = trainer_for(model, run, machine)
        trainer.add_callback(times)
        found = memory.measure(trainer)
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": str(error).splitlines()[0][:200]}
    row = {
        f"{kind.replace(' ', '_')}_gib": round(size / env.GIB, 4)
        for kind, size in found.items()
    }
    row["steps"] = trainer.args.max_steps
    row["seconds_per_step"] = round(statistics.median(times.seconds), 4)
    if not machine.use_cpu:
        free, whole = torch.cuda.mem_get_info()
        beside = whole - free - torch.cuda.memory_reserved() - managed_bytes()
        row["context_gib"] = round(beside / env.GIB, 3)
    return row


def measure_all(group: list[dict]) -> None:
    """Train each run of a group, of one shape, method and profile; print their rows."""
    env.quiet()
    machine = env.profile()
    model = make(group[0], machine)
    # Those with less checkpointing first: it leaves hooks and marks on the model.
    for run in sorted(group, key=lambda run: (run["every"] > 0, -run["every"])):
        print(json.dumps({**run, **measure(run, model, machine)}), flush=True)
        clean(model)


def main(names: list[str]) -> None:
    committed = json.loads(PREDICTED.read_text("utf-8"))["rows"]
    before = {tuple(row[name] for name in FIELDS): row for row in committed}

    def chosen(run):
        return not names or {run["shape"], f"{run['shape']}/{run['method']}"} & {*names}

    groups = {}
    for run in filter(chosen, runs()):
        key = run["shape"], run["method"], run["profile"]
        groups.setdefault(key, []).append(run)
    rows = []
    if names and (recorded.FOLDER / "memory_grid.json").exists():
        rows = recorded.read("memory_grid")["rows"]
        rows = [row for row in rows if not chosen(row)]
    for group in groups.values():
        done = subprocess.run(  # a process each: a model leaves its head behind
            [sys.executable, __file__, "measure", json.dumps(group)],
            env={**os.environ, "QLORA_PROFILE": group[0]["profile"]},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        for row in map(json.loads, lines):
            known = before[tuple(row[name] for name in FIELDS)]
            rows.append({**known, **row})
            print(rows[-1], flush=True)
        recorded.write("memory_grid", recorded.facts(), rows)  # nothing is lost


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure_all(json.loads(sys.argv[2]))
    elif sys.argv[1:2] == ["predict"]:
        text = json.dumps({"rows": [predict(run) for run in runs()]}, indent=1)
        PREDICTED.write_text(text + "\n", encoding="utf-8")
    else:
        main(sys.argv[1:])
