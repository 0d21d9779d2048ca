"""Will it fit? One call, one sentence."""

import bisect
from typing import NamedTuple

from transformers import BitsAndBytesConfig

from qlora_helpers import env, models
from qlora_helpers.env import GIB, check_whole
from qlora_helpers.memory import planned_run
from qlora_helpers.memory.byte_formulas import weight_bytes
from qlora_helpers.memory.planned_run import Plan
from qlora_helpers.memory.prediction import Prediction, predict_plan
from qlora_helpers.models.shapes import PROJECTIONS

# What CUDA takes beside torch, in GiB: 0.75 to 0.89 in data/measured/memory_grid.json,
# on an H200; no other card was measured.
CONTEXT_GIB = 0.9
# What torch's allocator holds and cannot use, as a share of the tensors that come and
# go: 0.23 at the longest row that a bisection found (data/measured/longest_row.json).
RESERVE = 0.25
HOST_GIB = 3.0  # of the process: at most 2.9 on an H200 (data/measured/notebooks.json)
# While a model is loaded: two copies of its largest 16-bit tensor, more than was seen
# on a CPU (data/measured/loading.json); the files themselves are mapped.
COPIES = 2
RANK = 16  # of the recipe's adapters
KINDS = ("bf16", "fp16")  # kinds of GPU that env.profile_of knows; a T4 is "fp16"


class Fit(NamedTuple):
    """The answer; printing it prints its sentence."""

    fits: bool
    sentence: str
    prediction: Prediction
    needed_gib: float  # torch's peak plus about what its allocator wastes
    disk_gib: float  # the 16-bit files that are loaded
    ram_gib: float  # the host's memory while they are loaded

    def __str__(self):
        return self.sentence


def will_it_fit(
    model, gpu_gib, method="qlora", batch=1, length=512, kind="bf16"
) -> Fit:
    """Whether the course's recipe trains `model` on a GPU, and what to change if not.

    model: a name of models.SHAPES, a Hub id, a directory, or a LlamaConfig. gpu_gib:
    the card's memory. method: "qlora", "lora" or "full" (16-bit weights, gradients and
    states). batch: rows on the GPU at a time; length: their tokens. kind: "fp16" for a
    GPU without bf16 (a T4), where the recipe repeats keys and values.

    Raises ValueError for any other argument and for rows longer than the model was made
    for, and what models.config_of raises.
    """
    check_whole("batch", batch)
    check_whole("length", length)
    room, config = _room(gpu_gib, kind), models.config_of(model)
    name = f"a Llama of width {config.hidden_size}" if config is model else model
    if length > config.max_position_embeddings:
        raise ValueError(
            f"length is {length:,}, but {name} was made for rows of at most "
            f"{config.max_position_embeddings:,} tokens: give a shorter length"
        )
    plan = of_recipe(config, method, batch, length, kind)
    prediction, needed = predict_plan(plan), _needed(plan)
    files = weight_bytes(of_recipe(config, "lora", 1, 1, "bf16"))
    tensors = [out * inside for out, inside in models.projections(config).values()]
    largest = 2 * max(*tensors, config.vocab_size * config.hidden_size)
    disk, ram = sum(files.values()) / GIB, HOST_GIB + COPIES * largest / GIB
    sentence = (
        f"{name}, {planned_run.METHODS[method]}, {batch} x {length:,} tokens in "
        f"{kind}: {'fits' if needed <= room else 'does not fit'}. Torch's peak is "
        f"{prediction.peak / GIB:.1f} GiB ({prediction.moment}), or about "
        f"{needed / GIB:.1f} GiB with what its allocator wastes. CUDA takes about "
        f"{CONTEXT_GIB} GiB more, and the card has {gpu_gib:g} GiB. Loading takes "
        f"{disk:.1f} GiB of disk and {ram:.1f} GiB of RAM."
    )
    if needed > room:
        changes = []
        if rows := _most_rows(plan, room):
            changes.append(_at_most(rows))
        elif tokens := _longest(plan, room):
            changes.append(f"rows of at most {tokens:,} tokens, 1 at a time")
        rows = _most_rows(of_recipe(config, "qlora", batch, length, kind), room)
        if method != "qlora" and rows == batch:
            changes.append("QLoRA")
        elif method != "qlora" and rows:
            changes.append(f"QLoRA and {_at_most(rows)}")
        if changes:
            sentence += f" It fits with {', or with '.join(changes)}."
        else:
            sentence += " Choose a smaller model or a larger card."
    return Fit(needed <= room, sentence, prediction, needed / GIB, disk, ram)


def longest_row(model, gpu_gib, method="qlora", kind="bf16") -> int:
    """Tokens of the longest row that fits alone; 0 if 64 do not fit.

    Tries steps of 64 up to what the model was made for. Takes and raises what
    will_it_fit does.
    """
    room, config = _room(gpu_gib, kind), models.config_of(model)
    return _longest(of_recipe(config, method, 1, 64, kind), room)


def of_recipe(config, method: str, rows: int, length: int, kind: str) -> Plan:
    """What `read` makes of `train.configs`, without importing TRL.

    config: a LlamaConfig. method: one of METHODS. kind: "bf16" or "fp16".
    """
    planned_run.check_method(method)
    planned_run.refuse_uncounted("model_config", config, "LlamaConfig")
    machine, full = env.profile_of(kind), method == "full"
    if full and machine.fp16:
        raise ValueError(planned_run.FULL_IN_FP16)
    # a model that was loaded in 4 bits has its own config; the recipe's is used instead
    loaded = getattr(config, "quantization_config", None)
    if not isinstance(loaded, BitsAndBytesConfig | None):
        raise ValueError("model is already quantized: give what it was made from")
    return Plan(
        config=config,
        four_bit=method == "qlora",
        double=method == "qlora",
        targets=() if full else tuple(PROJECTIONS),
        r=0 if full else RANK,
        rows=rows,
        length=length,
        compute=machine.compute_dtype.itemsize,
        optim=planned_run.FULL_OPTIMIZER if full else machine.optim,
        repeat_kv=machine.fp16,
    )


def _room(gpu_gib, kind) -> float:
    """Bytes that torch may take on a GPU of that kind."""
    env.check_gib("gpu_gib", gpu_gib)
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is unknown: take one of {list(KINDS)}")
    return (gpu_gib - CONTEXT_GIB) * GIB


def _needed(plan) -> float:
    """Bytes that torch needs: its peak plus about what its allocator wastes."""
    prediction = predict_plan(plan)
    stays = ("base weights", "adapters", "optimizer", "workspaces")
    passing = prediction.peak - sum(prediction.kinds[kind] for kind in stays)
    return prediction.peak + RESERVE * passing


def _most_rows(plan, room) -> int:
    """How many of a plan's rows fit at a time."""
    return _most(plan, room, "rows", range(1, plan.rows + 1))


def _longest(plan, room) -> int:
    """Tokens of the longest row that fits alone."""
    lengths = range(64, plan.config.max_position_embeddings + 1, 64)
    return 64 * _most(plan._replace(rows=1), room, "length", lengths)


def _most(plan, room, field, sizes) -> int:
    """How many of the ascending sizes of a plan's field fit."""
    return bisect.bisect(
        sizes, room, key=lambda size: _needed(plan._replace(**{field: size}))
    )


def _at_most(rows) -> str:
    return f"at most {rows} row{'s' if rows > 1 else ''} at a time"
