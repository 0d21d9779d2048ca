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
    config = models.config_of(model)
    room = _room(gpu_gib)

    def peak(method, batch, length):
        return memory.predict(*configs(config, method, batch, length)).peak

    prediction = memory.predict(*configs(config, method, batch, length))
    fits = prediction.peak <= room
    name = model if isinstance(model, str) else f"a Llama of width {config.hidden_size}"
    sentence = (
        f"{name}, {METHODS[method]}, {batch} x {length:,} tokens: "
        f"{'fits' if fits else 'does not fit'}: torch takes "
        f"{prediction.peak / env.GIB:.1f} GiB at its peak ({prediction.moment}), CUDA "
        f"about {CONTEXT_GIB}; the card has {gpu_gib:g}."
    )
    if not fits:
        changes = []
        if peak(method, 1, length) <= room:
            changes.append("1 row at a time")
        elif shorter := longest_row(config, gpu_gib, method):
            changes.append(f"rows of at most {shorter:,} tokens, 1 at a time")
        if method != "qlora" and peak("qlora", batch, length) <= room:
            changes.append("QLoRA")
        sentence += (
            f" It fits with {', or with '.join(changes)}."
            if changes
            else " Take a smaller model or a larger card."
        )
    return Fit(fits, sentence, prediction)


def longest_row(model, gpu_gib, method="qlora") -> int:
    """Tokens of the longest row that fits, one at a time; 0 if 64 do not.

    In steps of 64, up to what the model was made for. Takes what will_it_fit takes.
    """
    config, room = models.config_of(model), _room(gpu_gib)
    low, high = 0, config.max_position_embeddings // 64 + 1
    while high - low > 1:
        middle = (low + high) // 2
        peak = memory.predict(*configs(config, method, 1, 64 * middle)).peak
        low, high = (middle, high) if peak <= room else (low, middle)
    return 64 * low


def _room(gpu_gib) -> float:
    """Bytes that a predicted peak may take."""
    if not gpu_gib > 0:
        raise ValueError(f"gpu_gib is {gpu_gib}, expected the card's memory in GiB")
    return (gpu_gib - CONTEXT_GIB) * env.GIB / MARGIN


def configs(config, method, batch, length, every=1, machine=None):
    """The recipe's configs on a bf16 GPU, as memory.predict takes them.

    every: each how-manieth layer is checkpointed; 0: none. machine: another profile.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown: take one of {list(METHODS)}")
    machine = machine or env.elsewhere("bf16")
    settings = train.sft_config(machine, "never_written", 1, batch, 2e-4)
    settings.max_length = length
    details = {"use_reentrant": False} if every else None
    if every > 1:
        details["every_n_layers"] = every
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        if hasattr(settings, name):  # the second is new in transformers 5.17
            setattr(settings, name, every > 0)
            setattr(settings, f"{name}_kwargs", details)
    if method == "full":
        settings.optim = "adamw_torch_fused"  # transformers' default
    config = copy.deepcopy(config)
    config.dtype = machine.compute_dtype
    quantization = train.nf4_config(machine) if method == "qlora" else None
    adapters = None if method == "full" else train.lora_config()
    return config, quantization, adapters, settings
