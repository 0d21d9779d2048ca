"""Measure what a training run takes on a card without flash attention, such as a T4.

    python benchmarks/attention.py [SHAPE]

Writes data/measured/attention.json on an NVIDIA GPU, in fp16. It holds the peak and the
speed of the 8B with torch's flash and cuDNN attention turned on (as on a new card) and
off (as on a T4), with shared or repeated keys and values, and with and without padding.
It also holds the longest row that fits into 15 GiB less what CUDA takes, found by
bisection. The measurement proves what fits on a T4, but not its speed.
"""

import sys

import common
import torch
from longest_row import CARD_GIB, CLOSE, bisect
from memory_grid import configs, make
from transformers.integrations import sdpa_attention

from qlora_helpers import env, memory, models, train
from qlora_helpers.memory import fit
from qlora_helpers.memory.planned_run import Extras
from qlora_helpers.models import load

STEPS = 8  # the first ones search for kernels and make the optimizer's states
# (rows, tokens, padded); padded: no two rows have the same length
SIZES = [
    (1, 2048, False),
    (1, 4096, False),
    (1, 8192, False),
    (2, 512, False),
    (2, 2048, False),
    (2, 2048, True),
    (2, 4096, False),
    (2, 4096, True),
]
# name: (flash and cuDNN attention, keys and values repeated)
WAYS = {
    "as on a new card": (True, False),
    "as on a T4": (False, False),
    "as on a T4, repeated": (False, True),
}


def attend(way: str) -> None:
    """Let this process use the kernels and the keys and values of one of WAYS."""
    newer, repeated = WAYS[way]
    torch.backends.cuda.enable_flash_sdp(newer)
    torch.backends.cuda.enable_cudnn_sdp(newer)
    keep = (lambda *_, **__: False) if repeated else load.SHARED_KEYS
    sdpa_attention.use_gqa_in_sdpa = keep


def trained(model, run, padded: bool) -> dict:
    """Train STEPS steps on rows of random tokens; return the peak and the speed."""
    settings = configs(run, env.profile())[3]
    settings.max_steps = STEPS
    lengths = [run["length"]] * STEPS * run["rows"]
    if padded:
        lengths = [length - i for i, length in enumerate(lengths)]
    times = common.StepTimes()
    trainer = common.random_trainer(model, settings, lengths)
    trainer.remove_callback(train.LiveLoss)
    trainer.add_callback(times)
    found = memory.measure(trainer)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "tokens_per_second": round(sum(lengths) / STEPS / times.median(skip=3)),
        "peak_gib": common.gib(found["peak"]),
        "last_loss": round(losses[-1], 4),
    }


def peaks(shape: str):
    """Train each size in each way; yield a row after each run."""
    run = {"shape": shape, "method": "qlora", "length": 512, "rows": 1, "every": 1}
    model = make(run, env.profile())
    for rows, tokens, padded in SIZES:
        run |= {"rows": rows, "length": tokens}
        for way, (newer, repeated) in WAYS.items():
            attend(way)
            row = {"what": "peak", "shape": shape, "rows": rows, "tokens": tokens}
            row |= {"padded": padded, "way": way}
            if newer or repeated:  # the scores of math attention are not predicted
                # transformers repeats by itself if a mask hides padding
                extras = Extras(repeat_kv=repeated or padded)
                predicted = memory.predict(*configs(run, env.profile()), extras)
                row["predicted_gib"] = common.gib(predicted.peak)
            try:
                row |= trained(model, run, padded)
            except torch.OutOfMemoryError as error:
                row["out_of_memory"] = common.out_of_memory(error)
            common.clean(model)
            yield row


def longest(shape: str, way: str):
    """Bisect for the longest row that trains; yield the row after each try."""
    attend(way)
    promised = fit.longest_row(models.llama_config(shape), CARD_GIB, kind="fp16")
    for low, high in bisect(shape, 0, 2 * promised // CLOSE * CLOSE):
        yield {
            "what": "longest",
            "shape": shape,
            "way": way,
            "cap_gib": CARD_GIB - fit.CONTEXT_GIB,
            "promised_tokens": promised,
            "longest_tokens": low,
            "too_long_tokens": high,
        }


def main(shape: str = "8B") -> None:
    same = ("what", "shape", "rows", "tokens", "padded", "way")
    rows = common.in_child(peaks, shape, QLORA_PROFILE="fp16")
    common.record("attention", rows, same)
    for way in ("as on a T4", "as on a T4, repeated"):
        for row in common.in_child(longest, shape, way, QLORA_PROFILE="fp16"):
            # one call for each row, so that each try replaces the one before
            common.record("attention", [row], same)


if __name__ == "__main__":
    main(*sys.argv[1:])
