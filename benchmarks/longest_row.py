"""Find the longest row that an 8B trains on under a T4's memory, and compare.

    python benchmarks/longest_row.py

Writes data/measured/longest_row.json: a bisection on an NVIDIA GPU held to what a T4's
15 GiB leave beside CUDA, in fp16, with torch's usual allocator and with the one that
grows its segments. It proves the fit, not a T4's speed; nor a T4's attention, which
holds scores that this GPU's does not.
"""

import json
import os
import subprocess
import sys

import torch
from memory_grid import clean, make, trainer_for

from qlora_helpers import env, fit, memory, models, recorded

SHAPE, CARD_GIB = "8B", 15
CLOSE = 128  # tokens; the bisection ends there
ALLOCATORS = {"usual": "", "expandable_segments": "expandable_segments:True"}


def trains(model, length, machine) -> bool:
    """Whether two steps with one row of so many tokens fit under the cap."""
    run = {"shape": SHAPE, "method": "qlora", "length": length, "rows": 1, "every": 1}
    try:
        trainer = trainer_for(model, run, machine)
        trainer.train()
    except torch.OutOfMemoryError:
        return False
    finally:
        trainer = None
        clean(model)
    return True


def measure(name: str) -> None:
    """Bisect; print the row after each try, so that what was found is not lost."""
    env.quiet()
    machine = env.profile()
    cap = CARD_GIB - fit.CONTEXT_GIB
    run = {"shape": SHAPE, "method": "qlora", "length": 64, "rows": 1, "every": 1}
    model = make(run, machine)
    memory.hold_to(cap)
    predicted = fit.longest_row(models.llama_config(SHAPE), CARD_GIB, kind="fp16")
    low, high, tries = predicted // 2 // CLOSE * CLOSE, 2 * predicted, 0
    while high - low > CLOSE:
        middle = (low + high) // 2 // CLOSE * CLOSE
        fits = trains(model, middle, machine)
        low, high = (middle, high) if fits else (low, middle)
        tries += 1
        row = {
            "shape": SHAPE,
            "profile": machine.kind,
            "card_gib": CARD_GIB,
            "cap_gib": cap,
            "allocator": name,
            "predicted_tokens": predicted,
            "longest_tokens": low,
            "too_long_tokens": high,
            "tries": tries,
        }
        print(json.dumps(row), flush=True)


def main() -> None:
    rows = []
    for name, setting in ALLOCATORS.items():
        started = subprocess.Popen(  # a process each: the allocator is a process's
            [sys.executable, __file__, name],
            env={
                **os.environ,
                "QLORA_PROFILE": "fp16",
                "PYTORCH_CUDA_ALLOC_CONF": setting,
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for line in filter(lambda line: line.startswith("{"), started.stdout):
            print(line, end="", flush=True)
            found = [*rows, json.loads(line)]
            recorded.write("longest_row", recorded.facts(), found)
        rows = found
        if started.wait():
            sys.exit(f"{name}: the bisection broke off")


if __name__ == "__main__":
    if sys.argv[1:]:
        measure(sys.argv[1])
    else:
        main()
