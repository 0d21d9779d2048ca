"""A planned training run, read from its configs; what no formula counts is refused."""

from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
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
    "model was loaded with"
)
FULL_IN_FP16 = (
    "full fine-tuning of 16-bit weights does not work in fp16, because torch's "
    "GradScaler takes no fp16 gradients: give a lora_config, or train in bf16"
)


@strict
@dataclass
class Extras:
    """What changes a run's bytes and stands in none of the libraries' configs."""

    device: Literal["cuda", "cpu"] = "cuda"  # where it will run
    full_logits: bool = False  # a loss on all logits at once; always so before TRL 1.15
    kbit_casts: bool = False  # prepare_model_for_kbit_training was called
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
        return 4 if self.targets else self.compute

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
    if not isinstance(extras, Extras):
        raise TypeError(f"extras is {type(extras).__name__}: give an Extras or None")
    config = model_config
    if isinstance(config, str):
        config = models.llama_config(config)
    refuse_uncounted("model_config", config, "LlamaConfig")
    refuse_uncounted("sft_config", sft_config, "SFTConfig")
    if bnb_config is not None:
        refuse_uncounted("bnb_config", bnb_config, "BitsAndBytesConfig")
    if lora_config is not None:
        refuse_uncounted("lora_config", lora_config, "LoraConfig")
    mixed = torch.float16 if sft_config.fp16 else torch.float32
    mixed = torch.bfloat16 if sft_config.bf16 else mixed
    dtypes = {"sft_config": mixed, "model_config.dtype": config.dtype or mixed}
    if bnb_config is not None:
        dtypes["bnb_4bit_compute_dtype"] = bnb_config.bnb_4bit_compute_dtype
    optim = getattr(sft_config.optim, "value", sft_config.optim)
    loaded = getattr(config, "quantization_config", None)
    for contradicts, words in [
        # a BitsAndBytesConfig shows all of its settings, and cannot be compared
        (loaded is not None and repr(loaded) != repr(bnb_config), OTHER_QUANTIZATION),
        (
            bnb_config and not lora_config,
            "4-bit weights cannot train: add a LoraConfig",
        ),
        (len(set(dtypes.values())) > 1, f"{dtypes}: make them the same"),
        (sft_config.fp16 and not lora_config, FULL_IN_FP16),
        (extras.kbit_casts and not bnb_config, "extras.kbit_casts is for 4-bit models"),
        (optim not in OPTIMIZERS, f"{optim!r} is not predicted: {[*OPTIMIZERS]} are"),
    ]:
        if contradicts:
            raise ValueError(words)
    return Plan(
        config=config,
        four_bit=bnb_config is not None,
        double=bool(bnb_config and bnb_config.bnb_4bit_use_double_quant),
        targets=targets_of(lora_config) if lora_config else (),
        r=lora_config.r if lora_config else 0,
        rows=sft_config.per_device_train_batch_size,
        length=sft_config.max_length,
        compute=mixed.itemsize,
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
    refuse_uncounted("model_config", config, "LlamaConfig")
    machine, full = env.profile_of(kind), method == "full"
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
