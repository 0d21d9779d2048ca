"""Will it fit? One call, one sentence."""

import copy
from typing import NamedTuple

from . import env, memory, models, train

# What CUDA takes beside torch's tensors, in GiB: an ESTIMATE, until measured.
CONTEXT_GIB = 0.6
MARGIN = 1.05  # the prediction may be 5 % too low
METHODS = {
    "qlora": "QLoRA",
    "lora": "LoRA on 16-bit weights",
    "full": "full fine-tuning in 16 bits",
}


class Fit(NamedTuple):
    """The answer; printed it is its sentence."""

    fits: bool
    sentence: str
    prediction: memory.Prediction

    def __str__(self):
        return self.sentence


def will_it_fit(model, gpu_gib, method="qlora", batch=1, length=512) -> Fit:
    """Whether the course's recipe trains `model` on a GPU, and what to change if not.

    model: a name of models.SHAPES, a Hub id, a directory, or a LlamaConfig. gpu_gib:
    the card's memory. method: "qlora", "lora" or "full" (16-bit weights, gradients and
    states). batch: rows on the GPU at a time; length: their tokens.

    Raises ValueError for an unknown shape or method, or numbers that are not positive.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown: take one of {list(METHODS)}")
    if not gpu_gib > 0:
        raise ValueError(f"gpu_gib is {gpu_gib}, expected the card's memory in GiB")
    config = models.config_of(model)
    room = (gpu_gib - CONTEXT_GIB) * env.GIB / MARGIN

    def peak(method, batch, length):
        return memory.predict(*configs(config, method, batch, length)).peak

    prediction = memory.predict(*configs(config, method, batch, length))
    fits = prediction.peak <= room
    name = model if isinstance(model, str) else f"a Llama of {config.hidden_size}"
    sentence = (
        f"{name}, {METHODS[method]}, {batch} x {length:,} tokens: "
        f"{'fits' if fits else 'does not fit'}: torch takes "
        f"{prediction.peak / env.GIB:.1f} GiB at its peak ({prediction.moment}), CUDA "
        f"about {CONTEXT_GIB}; the card has {gpu_gib:g}."
    )
    if not fits:
        changes = []
        if peak(method, 1, length) <= room:
            changes.append(f"1 row at a time, {batch} accumulated")
        elif shorter := longest(lambda n: peak(method, 1, 64 * n) <= room, length / 64):
            changes.append(f"rows of at most {64 * shorter:,} tokens, 1 at a time")
        if method != "qlora" and peak("qlora", batch, length) <= room:
            changes.append("QLoRA")
        sentence += (
            f" It fits with {', or with '.join(changes)}."
            if changes
            else " Take a smaller model or a larger card."
        )
    return Fit(fits, sentence, prediction)


def longest(fits, most) -> int:
    """The largest whole number up to `most` for which `fits` holds; 0 for none."""
    low, high = 0, int(most) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def configs(config, method, batch, length, every=1, machine=None):
    """The recipe's configs on a bf16 GPU, as memory.predict takes them.

    every: each how-manieth layer is checkpointed; 0: none. machine: another profile.
    """
    machine = machine or env.elsewhere("bf16")
    settings = train.sft_config(machine, "never_written", 1, batch, 2e-4)
    settings.max_length = length
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        setattr(settings, name, every > 0)
        details = {"use_reentrant": False, "every_n_layers": every} if every else None
        setattr(settings, f"{name}_kwargs", details)
    if method == "full":
        settings.optim = "adamw_torch"
    config = copy.deepcopy(config)
    config.dtype = machine.compute_dtype
    quantization = train.nf4_config(machine) if method == "qlora" else None
    adapters = None if method == "full" else train.lora_config()
    return config, quantization, adapters, settings
