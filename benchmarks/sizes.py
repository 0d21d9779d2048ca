"""Time notebook 06's training call on larger Llamas: random weights, an NVIDIA GPU.

    python benchmarks/sizes.py

Writes data/measured/sizes.json. Random weights take the same time and memory as trained
ones. The fp16 runs hold to a T4's 15 GiB: that proves the fit, not a T4's speed.
"""

import common

from qlora_helpers import env, memory, models, train

STEPS = 12
RUNS = [("1B", "fp16", 15), ("8B", "fp16", 15), ("8B", "bf16", None)]


def measure(shape: str, cap_gib: float | None):
    """Yield the speed and the peak of a training run of STEPS steps."""
    machine = env.profile()
    memory.hold_to(cap_gib)
    base = models.random_llama(shape, train.nf4_config(machine))
    settings = common.settings_of(STEPS, rate=2e-4)
    trainer = common.recipe_trainer(base, common.embedded_tokenizer(), settings)
    with memory.peak() as peak:
        result = trainer.train()
    tokens = common.trained_tokens(trainer)
    yield {
        "shape": shape,
        "profile": machine.kind,
        "cap_gib": cap_gib,
        "batch": common.BATCH,
        "row_tokens": round(tokens / (STEPS * common.BATCH)),
        "steps": STEPS,
        "tokens_per_second": round(tokens / result.metrics["train_runtime"]),
        "peak_gib": common.gib(peak["bytes"], 2),
    }


def main() -> None:
    for shape, kind, cap in RUNS:  # a process each: the profile is the process's
        rows = common.in_child(measure, shape, cap, QLORA_PROFILE=kind)
        common.record("sizes", rows, same=("shape", "profile"))


if __name__ == "__main__":
    main()
