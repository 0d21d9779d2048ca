"""Find the longest row that an 8B trains on under a T4's memory, and compare.

    python benchmarks/longest_row.py

Writes data/measured/longest_row.json: a bisection on an NVIDIA GPU held to what a T4's
15 GiB leave beside CUDA, in fp16, with torch's usual allocator and with the one that
grows its segments. It proves the fit, not a T4's speed. Nor does it prove a T4's
attention, which holds scores that this GPU's attention does not hold.
"""

import common
import torch
from memory_grid import make, trainer_for

from qlora_helpers import env, memory, models
from qlora_helpers.memory import fit

SHAPE, CARD_GIB = "8B", 15
CLOSE = 128  # tokens; the bisection ends there
ALLOCATORS = {"usual": "", "expandable_segments": "expandable_segments:True"}


def bisect(shape: str, low: int, high: int):
    """Yield after each try the longest row that trained and the shortest that did not.

    A try is two steps with one row, under the cap that torch holds to.
    """
    machine = env.profile()
    run = {"shape": shape, "method": "qlora", "rows": 1, "every": 1}
    model = make(run | {"length": 64}, machine)
    memory.hold_to(CARD_GIB - fit.CONTEXT_GIB)
    while high - low > CLOSE:
        middle = (low + high) // 2 // CLOSE * CLOSE
        try:
            trainer_for(model, run | {"length": middle}, machine, steps=2).train()
            low = middle
        except torch.OutOfMemoryError:
            high = middle
        common.clean(model)
        yield low, high


def measure(allocator: str, shape: str):
    """Bisect; yield the row after each try, so that what was found is not lost."""
    predicted = fit.longest_row(models.llama_config(shape), CARD_GIB, kind="fp16")
    found = bisect(shape, predicted // 2 // CLOSE * CLOSE, 2 * predicted)
    for tries, (low, high) in enumerate(found, 1):
        yield {
            "shape": shape,
            "profile": env.profile().kind,
            "card_gib": CARD_GIB,
            "cap_gib": CARD_GIB - fit.CONTEXT_GIB,
            "allocator": allocator,
            "predicted_tokens": predicted,
            "longest_tokens": low,
            "too_long_tokens": high,
            "tries": tries,
        }


def main(shape: str = SHAPE) -> None:
    for name, setting in ALLOCATORS.items():  # a process each: it has one allocator
        variables = {"QLORA_PROFILE": "fp16", "PYTORCH_CUDA_ALLOC_CONF": setting}
        for row in common.in_child(measure, name, shape, **variables):
            # one call for each row, so that each try replaces the one before
            common.record("longest_row", [row], same=("allocator",))


if __name__ == "__main__":
    main()
