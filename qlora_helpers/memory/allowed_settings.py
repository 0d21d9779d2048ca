"""Which settings of a run may be set when it is predicted, and what some mean."""

import dataclasses
import tomllib
from pathlib import Path

from transformers import BitsAndBytesConfig, LlamaConfig
from transformers.trainer_pt_utils import AcceleratorConfig

from qlora_helpers.env import check_whole
from qlora_helpers.models.shapes import PROJECTIONS

TABLES = tomllib.loads(Path(__file__).with_name("settings.toml").read_text("utf-8"))
OPTIMIZERS = TABLES.pop("optimizers")
# Some settings have harmless values besides the default.
HARMLESS_VALUES = {
    "accelerator_config": (AcceleratorConfig(),),
    "_attn_implementation": ("sdpa",),
    "init_lora_weights": (False, "gaussian", "orthogonal"),
    "pad_to_multiple_of": (None,),  # what SFTConfig makes of "auto"
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM",),
}
# These settings of a LlamaConfig are not fields of its class.
ATTRIBUTES = {"output_attentions": False, "_attn_implementation": None}


def refuse_uncounted(name, config, kind: str) -> None:
    """Raise if `config` is not a `kind` or has a setting that no formula counts."""
    # by name, because importing TRL for its SFTConfig would take seconds
    if kind not in [parent.__name__ for parent in type(config).__mro__]:
        raise TypeError(f"{name} is {type(config).__name__}, expected {kind}")
    known = " ".join(TABLES[kind].values()).split()
    for setting, default in defaults(config).items():
        value = getattr(config, setting, default)
        unset = value == default or not (value or default)  # None, False, [] and ""
        harmless = value in HARMLESS_VALUES.get(setting, ())
        if not (unset or harmless or setting in known):
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


def checkpointing_of(sft_config) -> int:
    """Plan.every: how often a layer is checkpointed."""
    found = {}
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if hasattr(sft_config, name):  # the first is new in transformers 5.23
            details = getattr(sft_config, f"{name}_kwargs") or {}
            found[name] = dict(details) if getattr(sft_config, name) else None
    chosen, *other = found.values()
    if other not in ([], [chosen]):
        raise ValueError(
            f"sft_config contradicts itself: {found}; one is an alias of the other, "
            "and only SFTConfig(...) copies it: give it there, do not set it later"
        )
    if chosen is None:
        return 0
    every = chosen.pop("every_n_layers", 1)
    check_whole("every_n_layers", every)
    if any(chosen.values()):
        raise ValueError(
            f"checkpointing with {chosen} cannot be predicted: give only "
            "use_reentrant=False and every_n_layers"
        )
    return every


def targets_of(lora_config) -> tuple:
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
