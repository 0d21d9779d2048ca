"""Measure what a training run takes on a card without flash attention, such as a T4.

    python benchmarks/attention.py [SHAPE]

Writes data/measured/attention.json on an NVIDIA GPU, in fp16. It holds the peak and the
speed of the 8B with torch's flash and cuDNN attention turned on (as on a new card) and
off (as on a T4), with shared or repeated keys and values, and with and without padding.
It also holds the longest row that fits into 15 GiB less what CUDA takes, found by
bisection. The measurement proves what fits on a T4, but not its speed.
"""

import json
import os
import statistics
import subprocess
import sys

import torch
from datasets import Dataset
from longest_row import CARD_GIB, CLOSE
from memory_grid import StepTimes, clean, configs, make
from transformers import AutoTokenizer
from transformers.integrations import sdpa_attention

from qlora_helpers import embedded, env, fit, memory, models, recorded, train
from qlora_helpers.plan import Extras

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
    keep = (lambda *_, **__: False) if repeated else models.SHARED_KEYS
    sdpa_attention.use_gqa_in_sdpa = keep


def run_of(shape: str, rows: int, tokens: int) -> dict:
    """A run as memory_grid.py describes it: QLoRA, every layer checkpointed."""
    return {
        "shape": shape, "method": "qlora", "length": tokens, "rows": rows, "every": 1,
    }  # fmt: skip


def train_rows(model, run, machine, padded, steps) -> dict:
    """Train some steps on rows of random tokens; return the peak and the speed."""
    settings = configs(run, machine)[3]
    settings.max_steps = steps
    settings.output_dir = str(env.cache_dir() / "benchmark_attention")
    lengths = [run["length"]] * steps * run["rows"]
    if padded:
        lengths = [length - i for i, length in enumerate(lengths)]
    ids = [torch.randint(0, 1000, (length,)).tolist() for length in lengths]
    tokenizer = AutoTokenizer.from_pretrained(embedded.embedded_dir())
    times = StepTimes()
    trainer = train.build_trainer(
        model, tokenizer, Dataset.from_dict({"input_ids": ids}), settings
    )
    trainer.remove_callback(train.LiveLoss)
    trainer.add_callback(times)
    found = memory.measure(trainer)
    seconds = statistics.median(times.seconds[2:] or times.seconds)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "tokens_per_second": round(sum(lengths) / steps / seconds),
        "peak_gib": round(found["peak"] / env.GIB, 4),
        "last_loss": round(losses[-1], 4),
    }


def measure(shape: str) -> None:
    """Train each size in each way, and print a row after each run."""
    env.quiet()
    machine = env.profile()
    model = make(run_of(shape, 1, 512), machine)
    for rows, tokens, padded in SIZES:
        run = run_of(shape, rows, tokens)
        settings_of = fit.configs(
            models.llama_config(shape), "qlora", rows, tokens, 1, machine
        )
        for way, (newer, repeated) in WAYS.items():
            attend(way)
            row = {"what": "peak", "shape": shape, "rows": rows, "tokens": tokens}
            row |= {"padded": padded, "way": way}
            if newer or repeated:  # the scores of math attention are not predicted
                # transformers repeats by itself if a mask hides padding
                extras = Extras(repeat_kv=repeated or padded)
                predicted = memory.predict(*settings_of, extras).peak
                row["predicted_gib"] = round(predicted / env.GIB, 4)
            try:
                row |= train_rows(model, run, machine, padded, STEPS)
            except torch.OutOfMemoryError as error:
                row["out_of_memory"] = str(error).splitlines()[0][:200]
            clean(model)
            print(json.dumps(row), flush=True)
    cap = CARD_GIB - fit.CONTEXT_GIB
    memory.hold_to(cap)
    for way in ("as on a T4", "as on a T4, repeated"):
        attend(way)
        promised = fit.longest_row(models.llama_config(shape), CARD_GIB, kind="fp16")
        low, high = 0, 2 * promised // CLOSE * CLOSE
        while high - low > CLOSE:
            middle = (low + high) // 2 // CLOSE * CLOSE
            try:
                train_rows(model, run_of(shape, 1, middle), machine, False, 2)
                low = middle
            except torch.OutOfMemoryError:
                high = middle
            clean(model)
            row = {"what": "longest", "shape": shape, "way": way, "cap_gib": cap}
            row |= {"promised_tokens": promised, "longest_tokens": low}
            print(json.dumps(row | {"too_long_tokens": high}), flush=True)


def main(shape: str) -> None:
    done = subprocess.Popen(
        [sys.executable, __file__, "measure", shape],
        env={**os.environ, "QLORA_PROFILE": "fp16"},
        stdout=subprocess.PIPE,
        text=True,
    )
    rows, longest = [], {}
    for line in filter(lambda line: line.startswith("{"), done.stdout):
        print(line, end="", flush=True)
        row = json.loads(line)
        if row["what"] == "longest":
            longest[row["way"]] = row  # only the last try of each way counts
        else:
            rows.append(row)
        recorded.write("attention", recorded.facts(), [*rows, *longest.values()])
    if done.wait():
        sys.exit("the measurement stopped early: read the error above and run it again")


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(sys.argv[2])
    else:
        main(*(sys.argv[1:] or ["8B"]))
