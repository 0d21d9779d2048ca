"""The shapes of Llamas: by name, or of a model that is found elsewhere."""

import os
import tomllib
from pathlib import Path
from typing import NamedTuple

from transformers import LlamaConfig

from qlora_helpers.env import UNGATED
from qlora_helpers.models.sources import (
    EMBEDDED,
    hub_errors_explained,
    only_cached,
    source_of,
)

PROJECTIONS = [  # every linear layer of a Llama block
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
]


class Shape(NamedTuple):
    """The numbers that make a Llama's shape; shapes.toml explains them."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool  # lm_head is the embedding
    positions: int  # longest row, in tokens
    rope: dict


_FILE = Path(__file__).with_name("shapes.toml")
_READ = tomllib.loads(_FILE.read_text(encoding="utf-8"))
HUB_SHAPES = {
    hub: name for name, shape in _READ.items() for hub in shape.pop("hub", ())
}
SHAPES = {name: Shape(**shape) for name, shape in _READ.items()}


def config_of(model) -> LlamaConfig:
    """The config of a shape's name, "embedded", a Hub id, or a directory.

    A LlamaConfig is returned as it is. Raises TypeError for another kind of config,
    ValueError for a model that is not a Llama, and what load_base raises for a model
    that cannot be found.
    """
    if isinstance(model, LlamaConfig):
        return model
    if not isinstance(model, str | os.PathLike):
        raise TypeError(
            f"model is {type(model).__name__}, expected a LlamaConfig, one of the "
            f"shapes {list(SHAPES)}, {EMBEDDED!r}, a folder or a Hub id"
        )
    if model in SHAPES or model in HUB_SHAPES:
        return llama_config(HUB_SHAPES.get(model, model))
    source = source_of(model)
    if os.path.isdir(source) and not os.path.exists(f"{source}/config.json"):
        raise FileNotFoundError(f"{source} holds no config.json: give a model's folder")
    if not os.path.isdir(source) and "/" not in source:
        raise FileNotFoundError(
            f"{model!r} is not known: give one of the shapes {list(SHAPES)}, "
            f"{EMBEDDED!r}, a folder, or a Hub id like {UNGATED!r}"
        )
    with hub_errors_explained(model):
        offline = only_cached(source)
        found, _ = LlamaConfig.get_config_dict(source, local_files_only=offline)
    if found.get("model_type") != "llama":
        raise ValueError(
            f"{model} is not a Llama (its model_type is {found.get('model_type')!r}), "
            "so its memory cannot be predicted: give a Llama"
        )
    if "quantization_config" in found:
        raise ValueError(
            f"{model} is already quantized: give the model that it was made from"
        )
    return LlamaConfig.from_dict(found)


def llama_config(shape: str) -> LlamaConfig:
    """The LlamaConfig of a shape of SHAPES. Raises ValueError for another name."""
    if not isinstance(shape, str) or shape not in SHAPES:
        raise ValueError(f"shape {shape!r} is unknown: take one of {list(SHAPES)}")
    numbers = SHAPES[shape]
    return LlamaConfig(
        num_hidden_layers=numbers.layers,
        hidden_size=numbers.hidden,
        intermediate_size=numbers.intermediate,
        num_attention_heads=numbers.heads,
        num_key_value_heads=numbers.kv_heads,
        vocab_size=numbers.vocab,
        tie_word_embeddings=numbers.tied,
        max_position_embeddings=numbers.positions,
        rope_parameters=numbers.rope,
        rms_norm_eps=1e-5,
    )


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
