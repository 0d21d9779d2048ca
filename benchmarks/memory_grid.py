"""Measure the peak memory of training runs whose peaks were predicted before.

    python benchmarks/memory_grid.py predict    # on any machine, then commit the file
    python benchmarks/memory_grid.py [8B 3B/full ...]   # on an NVIDIA GPU of 140 GB

Without names, all runs are measured. With names of shapes, or of shapes and methods,
only those are measured, and the rows of the others stay.

`predict` writes benchmarks/memory_grid_predicted.json: the predictions as they stood
before any of these runs was made. The measurement writes
data/measured/memory_grid.json. Random weights take the same memory as trained ones.
Runs with a cap hold torch to so many GiB: that proves the fit, not the speed of such a
card.
"""

import json
import pathlib
import sys

import common
import torch
from bitsandbytes.functional import GlobalPageManager
from peft import get_peft_model

from qlora_helpers import env, memory, models, train

PREDICTED = pathlib.Path(__file__).with_name("memory_grid_predicted.json")
# The optimizer's states are there from the second step on; more where a step is short,
# so that it can be timed.
STEPS, MORE_STEPS, SHORT = 2, 6, 8192
# (shape, method, tokens of a row, rows, every): `every` 1 checkpoints each layer, 2
# every second one, 0 none
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


def runs() -> list[dict]:
    """Return all runs, the settings of each by name."""
    free = [(*run, None, "bf16") for run in GRID]
    return [dict(zip(FIELDS, run, strict=True)) for run in [*free, *CAPPED]]


def configs(run, machine):
    """Return what a run trains with, as memory.predict takes it."""
    config, quantization, lora, settings = train.configs(
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
    """Return a run with its predicted bytes, in GiB."""
    found = memory.predict(*configs(run, env.profile_of(run["profile"])))
    return {
        **run,
        "predicted_gib": common.gib(found.peak),
        "predicted_weights_gib": common.gib(sum(found.weights.values())),
        "moment": found.moment,
        "kinds_gib": {kind: common.gib(size) for kind, size in found.kinds.items()},
    }


def make(run, machine):
    """Return the model of a run: random weights, adapters if the method has any."""
    _, quantization, lora, _ = configs(run, machine)
    model = models.random_llama(run["shape"], quantization)
    return get_peft_model(model, lora) if lora else model.requires_grad_(True)


def trainer_for(model, run, machine, steps=None):
    """Return a trainer of a run; `steps` is the number of steps if not the grid's."""
    settings = configs(run, machine)[3]
    settings.max_steps = steps or settings.max_steps
    lengths = [run["length"]] * settings.max_steps * run["rows"]
    trainer = common.random_trainer(model, settings, lengths)
    if run["method"] == "full":  # what trains became fp32, which is meant for adapters
        model.to(machine.compute_dtype)
    return trainer


def managed_tensors():
    """Return the tensors in managed memory: bitsandbytes lists them, and frees none."""
    return GlobalPageManager.get_instance().paged_tensors


def managed_bytes() -> int:
    """Return the bytes in managed memory."""
    return sum(tensor.nbytes for tensor in managed_tensors())


def measured(run, model, machine) -> dict:
    """Train a run, and return what it took."""
    memory.hold_to(run["cap_gib"])
    times = common.StepTimes()
    try:
        trainer = trainer_for(model, run, machine)
        trainer.add_callback(times)
        found = memory.measure(trainer)
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": common.out_of_memory(error)}
    row = {}
    for kind, size in found.items():
        row[f"{kind.replace(' ', '_')}_gib"] = common.gib(size)
    row["steps"] = trainer.args.max_steps
    row["seconds_per_step"] = round(times.median(skip=1), 4)
    if not machine.use_cpu:
        free, whole = torch.cuda.mem_get_info()
        beside = whole - free - torch.cuda.memory_reserved() - managed_bytes()
        row["context_gib"] = common.gib(beside, 3)
    return row


def measure(group: list[dict]):
    """Train each run of a group, of one shape, method and profile; yield their rows."""
    machine = env.profile()
    model = make(group[0], machine)
    # Those with less checkpointing first: it leaves hooks and marks on the model.
    for run in sorted(group, key=lambda run: (run["every"] > 0, -run["every"])):
        yield {**run, **measured(run, model, machine)}
        common.clean(model)


def groups_of(names: list[str]) -> list[list[dict]]:
    """Return the runs that the names ask for, those of one model in one group."""
    groups = {}
    for run in runs():
        method = f"{run['shape']}/{run['method']}"
        if not names or {run["shape"], method} & set(names):
            groups.setdefault((method, run["profile"]), []).append(run)
    return list(groups.values())


def main(names: list[str]) -> None:
    committed = json.loads(PREDICTED.read_text("utf-8"))["rows"]
    before = {tuple(row[name] for name in FIELDS): row for row in committed}
    for group in groups_of(names):  # a process each: a model leaves its head behind
        rows = common.in_child(measure, group, QLORA_PROFILE=group[0]["profile"])
        rows = (before[tuple(row[name] for name in FIELDS)] | row for row in rows)
        try:
            common.record("memory_grid", rows, same=FIELDS)
        except RuntimeError as error:  # the other groups can run without this one
            print(error, file=sys.stderr, flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["predict"]:
        text = json.dumps({"rows": [predict(run) for run in runs()]}, indent=1)
        PREDICTED.write_text(text + "\n", encoding="utf-8")
    else:
        main(sys.argv[1:])
