"""A planned training run, read from its configs; what no formula counts is refused."""

import dataclasses
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from packaging.version import Version
from transformers import BitsAndBytesConfig, LlamaConfig
from transformers.trainer_pt_utils import AcceleratorConfig

from qlora_helpers import models
from qlora_helpers.env import check_whole
from qlora_helpers.models.shapes import PROJECTIONS

# From 1.15 on TRL's loss never makes all logits at once; the formulas are of this one,
# with transformers 5.17 and PEFT 0.21 beside it.
FUSED_LOSS = Version(version("trl")).release >= (1, 15)

TABLES = tomllib.loads(Path(__file__).with_name("settings.toml").read_text("utf-8"))
OPTIMIZERS = TABLES.pop("optimizers")
HARMLESS_VALUES = TABLES.pop("harmless_values") | {
    "accelerator_config": [AcceleratorConfig()],
    "pad_to_multiple_of": [None],  # what SFTConfig makes of "auto"
}
# These settings of a LlamaConfig are not fields of its class.
ATTRIBUTES = {"output_attentions": False, "_attn_implementation": None}

METHODS = {
    "qlora": "QLoRA",
    "lora": "LoRA on 16-bit weights",
    "full": "full fine-tuning in 16 bits",
}
FULL_OPTIMIZER = "adamw_torch_fused"  # of full fine-tuning: transformers' default

FULL_IN_FP16 = (
    "full fine-tuning of 16-bit weights does not work in fp16, because torch's "
    "GradScaler takes no fp16 gradients: give a lora_config, or train in bf16"
)


@strict
@dataclasses.dataclass
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
    on_gpu: bool = True
    kbit_casts: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def trained(self) -> int:
        """Bytes of a number of a trained tensor."""
        return 4 if self.targets else self.compute

    @property
    def between(self) -> int:
        """Bytes of a number that passes between layers: fp32 after the kbit casts."""
        return 4 if self.kbit_casts else self.compute

    def round_up(self, size: int) -> int:
        """The bytes that torch's allocator takes for `size`."""
        return in_blocks(size) if self.on_gpu else size


def in_blocks(size: int) -> int:
    """Bytes in the blocks of 512 that torch's allocator gives on CUDA."""
    return -(-size // 512) * 512


def read(model_config, bnb_config, lora_config, sft_config, extras) -> Plan:
    """The run that the configs describe; takes and raises what memory.predict does."""
    if extras is None:
        extras = Extras()
    if not isinstance(extras, Extras):
        raise TypeError(f"extras is {type(extras).__name__}: give an Extras or None")
    config = model_config
    if isinstance(model_config, str):
        config = models.llama_config(model_config)
    refuse_uncounted("model_config", config, "LlamaConfig")
    refuse_uncounted("sft_config", sft_config, "SFTConfig")
    if bnb_config is not None:
        refuse_uncounted("bnb_config", bnb_config, "BitsAndBytesConfig")
    if lora_config is not None:
        refuse_uncounted("lora_config", lora_config, "LoraConfig")
    dtype = _dtype_of(config, bnb_config, sft_config)
    optim = getattr(sft_config.optim, "value", sft_config.optim)
    if optim not in OPTIMIZERS:
        raise ValueError(f"optim is {optim!r}: take one of {[*OPTIMIZERS]}")
    if bnb_config and not lora_config:
        raise ValueError("4-bit weights cannot train: set lora_config")
    if sft_config.fp16 and not lora_config:
        raise ValueError(FULL_IN_FP16)
    if extras.kbit_casts and not bnb_config:
        raise ValueError("extras.kbit_casts needs a bnb_config")
    # a BitsAndBytesConfig shows all of its settings, and cannot be compared
    loaded = getattr(config, "quantization_config", None)
    if loaded is not None and repr(loaded) != repr(bnb_config):
        raise ValueError(
            "model_config.quantization_config is not the bnb_config: give the one that "
            "the model was loaded with"
        )
    return Plan(
        config=config,
        four_bit=bnb_config is not None,
        double=bool(bnb_config and bnb_config.bnb_4bit_use_double_quant),
        targets=_targets_of(lora_config) if lora_config else (),
        r=lora_config.r if lora_config else 0,
        rows=sft_config.per_device_train_batch_size,
        length=sft_config.max_length,
        compute=dtype.itemsize,
        optim=optim,
        repeat_kv=sft_config.fp16 if extras.repeat_kv is None else extras.repeat_kv,
        dropout=bool(lora_config and lora_config.lora_dropout),
        every=_checkpointing_of(sft_config),
        full_logits=extras.full_logits or not FUSED_LOSS,
        accumulates=sft_config.gradient_accumulation_steps > 1,
        on_gpu=extras.device == "cuda",
        kbit_casts=extras.kbit_casts,
    )


def check_method(method) -> None:
    """Raise ValueError unless `method` is one of METHODS."""
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown: take one of {list(METHODS)}")


def refuse_uncounted(name, config, kind: str) -> None:
    """Raise if `config` is not a `kind` or has a setting that no formula counts."""
    # by name, because importing TRL for its SFTConfig would take seconds
    if kind not in [parent.__name__ for parent in type(config).__mro__]:
        raise TypeError(f"{name} is {type(config).__name__}, expected {kind}")
    known = " ".join(TABLES[kind].values()).split()
    for setting, default in defaults(config).items():
        value = getattr(config, setting, default)
        if setting in known or value in [default, *HARMLESS_VALUES.get(setting, [])]:
            continue
        if value or default:  # None, False, [] and "" all mean that it is not set
            raise ValueError(
                f"{name}.{setting.lstrip('_')} is {getattr(value, 'value', value)!r}, "
                f"whose effect cannot be predicted: leave the setting at {default!r}"
            )
    for setting in TABLES[kind]["whole"].split():
        check_whole(f"{name}.{setting}", getattr(config, setting))


def defaults(config) -> dict:
    """The library's default of each setting of a config."""
    if isinstance(config, BitsAndBytesConfig):  # not a dataclass
        return vars(type(config)(load_in_4bit=True))
    found = dict(ATTRIBUTES) if isinstance(config, LlamaConfig) else {}
    for field in dataclasses.fields(config):
        made = field.default_factory
        found[field.name] = field.default if made is dataclasses.MISSING else made()
    return found


def _dtype_of(config, bnb_config, sft_config) -> torch.dtype:
    """The dtype in which a run computes; the configs must agree on it."""
    mixed = torch.float32
    if sft_config.fp16 or sft_config.bf16:
        mixed = torch.bfloat16 if sft_config.bf16 else torch.float16
    dtypes = {"sft_config": mixed, "model_config.dtype": config.dtype or mixed}
    if bnb_config is not None:
        dtypes["bnb_4bit_compute_dtype"] = bnb_config.bnb_4bit_compute_dtype
    if set(dtypes.values()) != {mixed}:
        raise ValueError(f"dtypes differ: {dtypes}; make them the same")
    return mixed


def _checkpointing_of(sft_config) -> int:
    """Plan.every: how often a layer is checkpointed."""
    found = {}
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if hasattr(sft_config, name):  # the first is new in transformers 5.23
            details = getattr(sft_config, f"{name}_kwargs") or {}
            found[name] = dict(details) if getattr(sft_config, name) else None
    details = found["gradient_checkpointing"]
    if any(other != details for other in found.values()):
        raise ValueError(
            f"sft_config contradicts itself: {found}; one is an alias of the other, "
            "and only SFTConfig(...) copies it: give it there, do not set it later"
        )
    if details is None:
        return 0
    every = details.pop("every_n_layers", 1)
    check_whole("every_n_layers", every)
    if any(details.values()):
        raise ValueError(
            f"checkpointing with {details} cannot be predicted: give only "
            "use_reentrant=False and every_n_layers"
        )
    return every


def _targets_of(lora_config) -> tuple:
    """The projections that get an adapter; the dropout is checked as well."""
    dropout, wanted = lora_config.lora_dropout, lora_config.target_modules
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(
            f"lora_config.lora_dropout is {dropout!r}: give a share from 0 to below 1"
        )
    wanted = PROJECTIONS if wanted == "all-linear" else wanted
    if not wanted or isinstance(wanted, str) or set(wanted) - set(PROJECTIONS):
        raise ValueError(
            f"target_modules is {wanted!r}, expected 'all-linear' or names of "
            f"{PROJECTIONS}"
        )
    return tuple(name for name in PROJECTIONS if name in wanted)
