"""A planned training run, read from its configs; what no formula counts is refused."""

import warnings
from importlib.metadata import version
from typing import NamedTuple

import torch
from packaging.version import Version
from transformers import BitsAndBytesConfig, LlamaConfig

from qlora_helpers import env, models
from qlora_helpers.memory.allowed_settings import (
    OPTIMIZERS,
    checkpointing_of,
    refuse_uncounted,
    targets_of,
)
from qlora_helpers.models.shapes import PROJECTIONS

# From 1.15 on TRL's loss never makes all logits at once; the formulas are of this one,
# with transformers 5.17 and PEFT 0.21 beside it.
FUSED_LOSS = Version(version("trl")).release >= (1, 15)

METHODS = {
    "qlora": "QLoRA",
    "lora": "LoRA on 16-bit weights",
    "full": "full fine-tuning in 16 bits",
}
RANK = 16  # of the recipe's adapters
FULL_OPTIMIZER = "adamw_torch_fused"  # of full fine-tuning: transformers' default

OTHER_QUANTIZATION = (
    "model_config.quantization_config is not the bnb_config: give the one that the "
    "model was loaded with as bnb_config"
)
FULL_IN_FP16 = (
    "full fine-tuning of 16-bit weights does not work in fp16, because torch's "
    "GradScaler takes no fp16 gradients: give a lora_config, or train in bf16"
)


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
    rows: int
    length: int  # tokens of a row
    compute: int  # bytes of a number in the compute dtype
    optim: str
    repeat_kv: bool
    dropout: bool = False
    every: int = 1  # 1: each layer is checkpointed, 2: every second one; 0: none
    full_logits: bool = not FUSED_LOSS
    accumulates: bool = False  # gradients of several batches before a step
    extras: Extras = Extras()

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def on_gpu(self) -> bool:
        return self.extras.device == "cuda"

    @property
    def trained(self) -> int:
        """Bytes of a number of a trained tensor."""
        return self.extras.adapter_dtype.itemsize if self.targets else self.compute

    @property
    def between(self) -> int:
        """Bytes of a number that passes between layers: fp32 after the kbit casts."""
        return 4 if self.extras.kbit_casts else self.compute

    def up(self, size: int) -> int:
        """The bytes that torch's allocator takes for `size`."""
        return in_blocks(size) if self.on_gpu else size


def in_blocks(size: int) -> int:
    """Bytes in the blocks of 512 that torch's allocator gives on CUDA."""
    return -(-size // 512) * 512


def read(model_config, bnb_config, lora_config, sft_config, extras) -> Plan:
    """The run that the configs describe; takes and raises what memory.predict does."""
    extras = Extras() if extras is None else extras
    _check_extras(extras)
    config = _checked_model(model_config)
    if sft_config is None:
        raise TypeError("sft_config is missing: batch and length come from it")
    refuse_uncounted("bnb_config", bnb_config, "BitsAndBytesConfig")
    refuse_uncounted("lora_config", lora_config, "LoraConfig")
    refuse_uncounted("sft_config", sft_config, "SFTConfig")
    mixed = torch.float16 if sft_config.fp16 else torch.float32
    mixed = torch.bfloat16 if sft_config.bf16 else mixed
    dtype = bnb_config.bnb_4bit_compute_dtype if bnb_config else config.dtype or mixed
    optim = getattr(sft_config.optim, "value", sft_config.optim)
    loaded = getattr(config, "quantization_config", None)
    for contradicts, words in [
        # a BitsAndBytesConfig shows all of its settings, and cannot be compared
        (loaded is not None and repr(loaded) != repr(bnb_config), OTHER_QUANTIZATION),
        (
            bnb_config and not lora_config,
            "4-bit weights cannot train: give a lora_config, or no bnb_config",
        ),
        (
            config.dtype not in (None, dtype),
            f"model_config.dtype is {config.dtype}, but bnb_4bit_compute_dtype is "
            f"{dtype}: make them the same",
        ),
        (
            mixed != dtype,
            f"weights compute in {dtype}, but sft_config trains in {mixed} "
            f"(bf16={sft_config.bf16}, fp16={sft_config.fp16}): make them the same",
        ),
        (sft_config.fp16 and not lora_config, FULL_IN_FP16),
        (
            extras.kbit_casts and not bnb_config,
            "extras.kbit_casts is for 4-bit models: give a bnb_config",
        ),
        (
            optim not in OPTIMIZERS,
            f"optim {optim!r} is not predicted: {list(OPTIMIZERS)} are",
        ),
    ]:
        if contradicts:
            raise ValueError(words)
    return Plan(
        config=config,
        four_bit=bnb_config is not None,
        double=bnb_config is not None and bnb_config.bnb_4bit_use_double_quant,
        targets=targets_of(lora_config) if lora_config else (),
        r=lora_config.r if lora_config else 0,
        rows=sft_config.per_device_train_batch_size,
        length=sft_config.max_length,
        compute=dtype.itemsize,
        optim=optim,
        repeat_kv=sft_config.fp16 if extras.repeat_kv is None else extras.repeat_kv,
        dropout=bool(lora_config and lora_config.lora_dropout),
        every=checkpointing_of(sft_config),
        full_logits=extras.full_logits or not FUSED_LOSS,
        accumulates=sft_config.gradient_accumulation_steps > 1,
        extras=extras,
    )


def of_recipe(config, method: str, rows: int, length: int, kind: str) -> Plan:
    """What `read` makes of `train.configs`, without importing TRL.

    config: a LlamaConfig. method: one of METHODS. kind: "bf16" or "fp16".
    """
    check_method(method)
    config, machine = _checked_model(config), env.profile_of(kind)
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
        rows=rows,
        length=length,
        compute=machine.compute_dtype.itemsize,
        optim=FULL_OPTIMIZER if full else machine.optim,
        repeat_kv=machine.fp16,
    )


def check_method(method) -> None:
    """Raise ValueError unless `method` is one of METHODS."""
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown: take one of {list(METHODS)}")


def _checked_model(config) -> LlamaConfig:
    """The LlamaConfig that is given or named."""
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
            f"of the shapes {list(models.SHAPES)}"
        )
    refuse_uncounted("model_config", config, "LlamaConfig")
    return config


def _check_extras(extras) -> None:
    """Raise TypeError or ValueError, naming the field, unless all fields make sense."""
    if not isinstance(extras, Extras):
        raise TypeError(f"extras is {type(extras).__name__}: give an Extras or None")
    dtype = extras.adapter_dtype
    floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    for name, right, expected in [
        ("device", extras.device in ("cuda", "cpu"), "'cuda' or 'cpu'"),
        ("full_logits", isinstance(extras.full_logits, bool), "True or False"),
        ("kbit_casts", isinstance(extras.kbit_casts, bool), "True or False"),
        ("adapter_dtype", floating, "a floating torch.dtype"),
        ("repeat_kv", isinstance(extras.repeat_kv, bool | None), "True, False or None"),
    ]:
        if not right:
            raise ValueError(
                f"extras.{name} is {getattr(extras, name)!r}: give {expected}"
            )
