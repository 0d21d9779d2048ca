"""Measure what a training run takes on a card without flash attention, as a T4 is.

    python benchmarks/attention.py [SHAPE]

Writes data/measured/attention.json on an NVIDIA GPU, in fp16: the peak and the speed of
the 8B with torch's flash and cuDNN attention switched on (as on a new card) and off (as
on a T4), with keys and values that heads share, or repeated, without and with padding;
then the longest row under what 15 GiB leave beside CUDA, by bisection. It proves what
fits, not a T4's speed.
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

STEPS = 8  # the first ones find kernels and make the optimizer's states
# (rows, tokens, whether no two rows have one length, so that each batch is padded)
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
    """Take the kernels and the keys and values of one of WAYS, in this process."""
    newer, repeated = WAYS[way]
    torch.backends.cuda.enable_flash_sdp(newer)
    torch.backends.cuda.enable_cudnn_sdp(newer)
    keep = (lambda *_, **__: False) if repeated else models.SHARED_KEYS
    sdpa_attention.use_gqa_in_sdpa = keep


def run_of(shape: str, rows: int, tokens: int) -> dict:
    """A run as memory_grid.py knows it: QLoRA, every layer checkpointed."""
    return {
        "shape": shape, "method": "qlora", "length": tokens, "rows": rows, "every": 1,
    }  # fmt: skip


def train_rows(model, run, machine, padded, steps) -> dict:
    """Train some steps over rows of random tokens: the peak and the speed."""
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
    """Train each size in each way; print a row after each."""
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
                # transformers repeats by itself where a mask hides padding
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
            longest[row["way"]] = row  # the last try of each way counts
        else:
            rows.append(row)
        recorded.write("attention", recorded.facts(), [*rows, *longest.values()])
    if done.wait():
        sys.exit("the measurement broke off")


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(sys.argv[2])
    else:
        main(*(sys.argv[1:] or ["8B"]))
