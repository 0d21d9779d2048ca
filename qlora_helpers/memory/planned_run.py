"""A planned training run, read from its configs; contradictions are refused."""

import warnings
from importlib.metadata import version
from typing import NamedTuple

import torch
from packaging.version import Version
from transformers import BitsAndBytesConfig, LlamaConfig

from qlora_helpers import env, models
from qlora_helpers.env import check_whole
from qlora_helpers.memory.allowed_settings import (
    checkpointing_of,
    refuse_uncounted,
    same_quantization,
    targets_of,
)
from qlora_helpers.models.shapes import PROJECTIONS

# From 1.15 on TRL's loss never makes all logits at once; the formulas are of this one,
# with transformers 5.17 and PEFT 0.21 beside it.
FUSED_LOSS = Version(version("trl")).release >= (1, 15)

# bytes of each of Adam's two states for one number; None: in the tensor's own dtype
OPTIMIZERS = {
    "adamw_torch": None,
    "adamw_torch_fused": None,
    "adamw_bnb_8bit": 1,
    "adamw_8bit": 1,
    "paged_adamw_8bit": 1,
    "paged_adamw_32bit": 4,
}

# Whole numbers of a LlamaConfig that every formula starts from.
SIZES = """vocab_size hidden_size intermediate_size num_hidden_layers
num_attention_heads num_key_value_heads""".split()

METHODS = {
    "qlora": "QLoRA",
    "lora": "LoRA on 16-bit weights",
    "full": "full fine-tuning in 16 bits",
}
OTHER_QUANTIZATION = (
    "model_config.quantization_config is not the bnb_config: give the one that the "
    "model was loaded with as bnb_config"
)
FULL_IN_FP16 = (
    "full fine-tuning of 16-bit weights does not work in fp16, because torch's "
    "GradScaler takes no fp16 gradients: give a lora_config, or train in bf16"
)
RANK = 16  # of the recipe's adapters
FULL_OPTIMIZER = "adamw_torch_fused"  # of full fine-tuning: transformers' default


class Extras(NamedTuple):
    """What changes a run's bytes and stands in none of the libraries' configs."""

    device: str = "cuda"  # where it will run, "cuda" or "cpu"
    full_logits: bool = False  # a loss on all logits at once; always so before TRL 1.15
    kbit_casts: bool = False  # prepare_model_for_kbit_training was called
    adapter_dtype: torch.dtype = torch.float32  # TRL left alone takes bf16
    # True: attention repeats keys and values that heads share. None: as the recipe
    # does, which repeats them in fp16, for GPUs without flash attention.
    repeat_kv: bool | None = None


class Plan(NamedTuple):
    """What the byte formulas need to know of a run."""

    config: LlamaConfig
    four_bit: bool
    double: bool  # double quantization
    targets: tuple  # names of the projections with an adapter; (): all weights train
    r: int
    dropout: bool
    rows: int
    length: int  # tokens of a row
    every: int  # 1: each layer is checkpointed, 2: every second one; 0: none
    compute: int  # bytes of a number in the compute dtype
    optim: str
    full_logits: bool
    repeat_kv: bool
    accumulates: bool  # gradients of several batches before a step
    extras: Extras


def read(model_config, bnb_config, lora_config, sft_config, extras) -> Plan:
    """The run that the configs describe.

    Raises TypeError or ValueError, naming the setting, for a setting that the formulas
    do not count.
    """
    extras = Extras() if extras is None else extras
    _check_extras(extras)
    config = checked_model(model_config)
    if sft_config is None:
        raise TypeError("sft_config is missing: batch and length come from it")
    refuse_uncounted("bnb_config", bnb_config, "BitsAndBytesConfig")
    refuse_uncounted("lora_config", lora_config, "LoraConfig")
    refuse_uncounted("sft_config", sft_config, "SFTConfig")
    loaded = getattr(config, "quantization_config", None)
    if loaded is not None and not same_quantization(loaded, bnb_config):
        raise ValueError(OTHER_QUANTIZATION)
    rows, length = sft_config.per_device_train_batch_size, sft_config.max_length
    check_whole("per_device_train_batch_size", rows)
    check_whole("max_length", length)
    check_whole("gradient_accumulation_steps", sft_config.gradient_accumulation_steps)
    mixed = torch.float16 if sft_config.fp16 else torch.float32
    mixed = torch.bfloat16 if sft_config.bf16 else mixed
    dtype = config.dtype or mixed
    if bnb_config is not None:
        if lora_config is None:
            raise ValueError(
                "4-bit weights cannot train: give a lora_config, or no bnb_config"
            )
        dtype = bnb_config.bnb_4bit_compute_dtype
        if config.dtype not in (None, dtype):
            raise ValueError(
                f"model_config.dtype is {config.dtype}, in which embedding, head and "
                f"norms would be, and bnb_4bit_compute_dtype is {dtype}: make them the "
                "same"
            )
    if mixed != dtype:
        raise ValueError(
            f"weights compute in {dtype} and sft_config trains in {mixed} "
            f"(bf16={sft_config.bf16}, fp16={sft_config.fp16}): make them the same"
        )
    if mixed == torch.float16 and lora_config is None:
        raise ValueError(FULL_IN_FP16)
    if extras.kbit_casts and bnb_config is None:
        raise ValueError("extras.kbit_casts is for 4-bit models: give a bnb_config")
    optim = getattr(sft_config.optim, "value", sft_config.optim)
    if optim not in OPTIMIZERS:
        raise ValueError(f"optim {optim!r} is not predicted: {list(OPTIMIZERS)} are")
    return Plan(
        config=config,
        four_bit=bnb_config is not None,
        double=bnb_config is not None and bnb_config.bnb_4bit_use_double_quant,
        targets=targets_of(lora_config),
        r=lora_config.r if lora_config else 0,
        dropout=bool(lora_config and lora_config.lora_dropout),
        rows=rows,
        length=length,
        every=checkpointing_of(sft_config),
        compute=dtype.itemsize,
        optim=optim,
        full_logits=extras.full_logits or not FUSED_LOSS,
        repeat_kv=sft_config.fp16 if extras.repeat_kv is None else extras.repeat_kv,
        accumulates=sft_config.gradient_accumulation_steps > 1,
        extras=extras,
    )


def checked_model(config) -> LlamaConfig:
    """The LlamaConfig that is given or named. Raises TypeError or ValueError."""
    if not FUSED_LOSS:
        warnings.warn(
            "the byte formulas are those of TRL 1.15 and later: this older one keeps "
            "more than they say",
            stacklevel=4,
        )
    if isinstance(config, str):
        config = models.llama_config(config)
    if not isinstance(config, LlamaConfig):
        raise TypeError(
            f"model_config is {type(config).__name__}, expected a LlamaConfig or one "
            f"of the shapes {list(models.SHAPES)}: other architectures keep other bytes"
        )
    refuse_uncounted("model_config", config, "LlamaConfig")
    for name in SIZES:
        check_whole(f"model_config.{name}", getattr(config, name))
    return config


def of_recipe(config, method: str, rows: int, length: int, kind: str) -> Plan:
    """The run of the course's recipe on a GPU, without TRL's SFTConfig.

    config: a LlamaConfig. method: one of METHODS. kind: "bf16" or "fp16". The plan is
    what `read` makes of `train.configs`. Raises ValueError for an unknown method.
    """
    check_method(method)
    config = checked_model(config)
    machine = env.profile_of(kind)
    full = method == "full"
    if full and machine.fp16:
        raise ValueError(FULL_IN_FP16)
    # a model that was loaded in 4 bits has its own config; the recipe's is used instead
    loaded = getattr(config, "quantization_config", None)
    if not isinstance(loaded, BitsAndBytesConfig | None):
        raise ValueError(OTHER_QUANTIZATION)
    return Plan(
        config=config,
        four_bit=method == "qlora",
        double=method == "qlora",
        targets=() if full else tuple(PROJECTIONS),
        r=0 if full else RANK,
        dropout=False,
        rows=rows,
        length=length,
        every=1,
        compute=machine.compute_dtype.itemsize,
        optim=FULL_OPTIMIZER if full else machine.optim,
        full_logits=not FUSED_LOSS,
        repeat_kv=machine.fp16,
        accumulates=False,
        extras=Extras(),
    )


def check_method(method) -> None:
    """Raise ValueError unless `method` is one of METHODS."""
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown: take one of {list(METHODS)}")


def _check_extras(extras) -> None:
    """Raise TypeError or ValueError, naming the field, unless all fields make sense."""
    if not isinstance(extras, Extras):
        raise TypeError(f"extras is {type(extras).__name__}: give an Extras or None")
    if extras.device not in ("cuda", "cpu"):
        raise ValueError(f"extras.device is {extras.device!r}, expected 'cuda', 'cpu'")
    dtype = extras.adapter_dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(
            f"extras.adapter_dtype is {dtype!r}: give a floating torch.dtype"
        )
    for name in ("full_logits", "kbit_casts", "repeat_kv"):
        value = getattr(extras, name)
        if not isinstance(value, bool) and (name, value) != ("repeat_kv", None):
            other = ", False or None" if name == "repeat_kv" else " or False"
            raise ValueError(f"extras.{name} is {value!r}: give True{other}")
