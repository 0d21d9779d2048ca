"""Time notebook 06's training call on larger Llamas: random weights, an NVIDIA GPU.

    python benchmarks/sizes.py

Writes data/measured/sizes.json. Random weights take the same time and memory as trained
ones. The fp16 runs hold to a T4's 15 GiB: that proves the fit, not a T4's speed.
"""

import json
import os
import subprocess
import sys

from peft import get_peft_model
from transformers import AutoTokenizer

from qlora_helpers import embedded, env, memory, models, recorded, records, train

STEPS, BATCH = 12, 8
RUNS = [("1B", "fp16", 15), ("8B", "fp16", 15), ("8B", "bf16", None)]


def run(shape: str, cap_gib: float | None) -> dict:
    """One row: speed and peak of a training run of STEPS steps."""
    env.quiet()
    machine = env.profile()
    memory.hold_to(cap_gib)
    tokenizer = AutoTokenizer.from_pretrained(embedded.embedded_dir())
    model = models.random_llama(shape, train.nf4_config(machine))
    model = get_peft_model(model, train.lora_config())
    dataset = records.to_prompt_completion(
        records.load("train"), tokenizer, system=records.SYSTEM
    )
    folder = str(env.cache_dir() / "benchmark_sizes")
    settings = train.sft_config(machine, folder, STEPS, BATCH, 2e-4)
    trainer = train.build_trainer(model, tokenizer, dataset, settings)
    train.check_effective(trainer, machine)
    with memory.peak() as peak:
        result = trainer.train()
    tokens = trainer.state.log_history[-2]["num_tokens"]
    return {
        "shape": shape,
        "profile": machine.kind,
        "cap_gib": cap_gib,
        "batch": BATCH,
        "row_tokens": round(tokens / (STEPS * BATCH)),
        "steps": STEPS,
        "tokens_per_second": round(tokens / result.metrics["train_runtime"]),
        "peak_gib": round(peak["bytes"] / env.GIB, 2),
    }


def main() -> None:
    rows = []
    for shape, kind, cap in RUNS:
        done = subprocess.run(  # a process each: the profile is the process's
            [sys.executable, __file__, shape, str(cap or "")],
            env={**os.environ, "QLORA_PROFILE": kind},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    print(recorded.write("sizes", recorded.facts(), rows))


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(run(sys.argv[1], float(sys.argv[2] or 0) or None)))
    else:
        main()
