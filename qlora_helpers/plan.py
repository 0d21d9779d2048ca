"""A training run as its configs describe it, read once, contradictions refused."""

import warnings
from typing import NamedTuple

import torch
from transformers import LlamaConfig

from . import env, models

# From 1.15 on TRL's loss never makes all logits at once; the formulas are of this one,
# with transformers 5.17 and PEFT 0.21 beside it.
FUSED_LOSS = env.version_tuple(env.versions(["trl"])["trl"]) >= (1, 15)

# bytes of each of Adam's two states for one number; None: in the tensor's own dtype
OPTIMIZERS = {
    "adamw_torch": None,
    "adamw_torch_fused": None,
    "adamw_bnb_8bit": 1,
    "adamw_8bit": 1,
    "paged_adamw_8bit": 1,
    "paged_adamw_32bit": 4,
}


class Extras(NamedTuple):
    """What changes a run's bytes and stands in none of the libraries' configs."""

    device: str = "cuda"  # where it will run, "cuda" or "cpu"
    full_logits: bool = False  # a loss on all logits at once; always so before TRL 1.15
    kbit_casts: bool = False  # prepare_model_for_kbit_training was called
    adapter_dtype: torch.dtype = torch.float32  # TRL left alone takes bf16


class Plan(NamedTuple):
    """What the byte formulas of memory.py need to know of a run."""

    config: LlamaConfig
    four_bit: bool
    double: bool  # double quantization
    targets: tuple  # names of the projections with an adapter; (): all weights train
    r: int
    dropout: bool
    rows: int
    length: int  # tokens of a row
    every: int  # each how-manieth layer is checkpointed; 0: none
    compute: int  # bytes of a number in the compute dtype
    optim: str
    full_logits: bool
    accumulates: bool  # gradients of several batches before a step
    extras: Extras


def read(model_config, bnb_config, lora_config, sft_config, extras) -> Plan:
    """The run that the configs describe; raises for what `predict` cannot predict."""
    extras = extras or Extras()
    if not FUSED_LOSS:
        warnings.warn(
            "the byte formulas are those of TRL 1.15 and later: this older one keeps "
            "more than they say",
            stacklevel=3,
        )
    config = model_config
    if isinstance(config, str):
        config = models.llama_config(config)
    if not isinstance(config, LlamaConfig):
        raise TypeError(
            f"model_config is {type(config).__name__}, expected a LlamaConfig or one "
            f"of the shapes {list(models.SHAPES)}: other architectures keep other bytes"
        )
    if sft_config is None:
        raise TypeError("sft_config is missing: batch and length come from it")
    rows, length = sft_config.per_device_train_batch_size, sft_config.max_length
    for name, value in [("per_device_train_batch_size", rows), ("max_length", length)]:
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}, expected a whole number from 1")
    if extras.device not in ("cuda", "cpu"):
        raise ValueError(f"extras.device is {extras.device!r}, expected 'cuda', 'cpu'")
    mixed = torch.float16 if sft_config.fp16 else torch.float32
    mixed = torch.bfloat16 if sft_config.bf16 else mixed
    dtype = config.dtype or mixed
    if bnb_config is not None:
        if not bnb_config.load_in_4bit:
            raise ValueError("bnb_config is not 4-bit: only 4-bit ones are predicted")
        if lora_config is None:
            raise ValueError(
                "4-bit weights cannot train: give a lora_config, or no bnb_config"
            )
        dtype = bnb_config.bnb_4bit_compute_dtype
    if mixed != dtype:
        raise ValueError(
            f"weights compute in {dtype} and sft_config trains in {mixed} "
            f"(bf16={sft_config.bf16}, fp16={sft_config.fp16}): make them the same"
        )
    if extras.kbit_casts and bnb_config is None:
        raise ValueError("extras.kbit_casts is for 4-bit models: give a bnb_config")
    optim = getattr(sft_config.optim, "value", sft_config.optim)
    if optim not in OPTIMIZERS:
        raise ValueError(f"optim {optim!r} is not predicted: {list(OPTIMIZERS)} are")
    every = _checkpoints(sft_config)
    return Plan(
        config=config,
        four_bit=bnb_config is not None,
        double=bnb_config is not None and bnb_config.bnb_4bit_use_double_quant,
        targets=_targets(lora_config),
        r=lora_config.r if lora_config else 0,
        dropout=bool(lora_config and lora_config.lora_dropout),
        rows=rows,
        length=length,
        every=every,
        compute=dtype.itemsize,
        optim=optim,
        full_logits=extras.full_logits
        or sft_config.label_smoothing_factor > 0
        or not FUSED_LOSS,
        accumulates=sft_config.gradient_accumulation_steps > 1,
        extras=extras,
    )


def _checkpoints(sft_config) -> int:
    """Each how-manieth layer is checkpointed; 0: none is."""
    found = {}
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if hasattr(sft_config, name):  # the first is new in transformers 5.17
            chosen = bool(getattr(sft_config, name))
            details = getattr(sft_config, f"{name}_kwargs") if chosen else None
            found[name] = (chosen, dict(details or {}))
    if len({str(choice) for choice in found.values()}) > 1:
        raise ValueError(
            f"sft_config contradicts itself: {found}; one is an alias of the other, "
            "and only SFTConfig(...) copies it: give it there, do not set it later"
        )
    chosen, details = next(iter(found.values()))
    every = details.pop("every_n_layers", 1)
    if getattr(sft_config, "activation_offloading", False) or any(details.values()):
        raise ValueError(
            f"checkpointing with {details or 'offloading'} is not predicted: "
            "use_reentrant=False and every_n_layers are"
        )
    return every if chosen else 0


def _targets(lora_config) -> tuple:
    """The projections that get an adapter."""
    if lora_config is None:
        return ()
    known = [*projections(models.llama_config("tiny"))]
    wanted = lora_config.target_modules
    wanted = known if wanted == "all-linear" else wanted
    if not wanted or isinstance(wanted, str) or set(wanted) - set(known):
        raise ValueError(
            f"target_modules is {wanted!r}, expected 'all-linear' or names of {known}"
        )
    for name in (
        "use_dora",
        "modules_to_save",
        "rank_pattern",
        "trainable_token_indices",
    ):
        if getattr(lora_config, name, None):
            raise ValueError(f"lora_config.{name} is set: that is not predicted")
    if lora_config.bias != "none":
        raise ValueError(f"lora_config.bias is {lora_config.bias!r}: not predicted")
    return tuple(name for name in known if name in wanted)


def projections(config) -> dict[str, tuple[int, int]]:
    """The seven matrices of a layer: (outputs, inputs)."""
    h, f = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or h // config.num_attention_heads
    q, kv = head * config.num_attention_heads, head * config.num_key_value_heads
    return {
        "q_proj": (q, h),
        "k_proj": (kv, h),
        "v_proj": (kv, h),
        "o_proj": (h, q),
        "gate_proj": (f, h),
        "up_proj": (f, h),
        "down_proj": (h, f),
    }
