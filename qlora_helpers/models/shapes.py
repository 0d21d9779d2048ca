"""The shapes of Llamas: by name, or of a model that is found elsewhere."""

import os
import tomllib
from pathlib import Path
from types import SimpleNamespace

from transformers import LlamaConfig

from qlora_helpers.env import UNGATED
from qlora_helpers.models.sources import EMBEDDED, base_folder

# LlamaConfig's names of the numbers in shapes.toml, which explains them.
CONFIG_NAMES = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "vocab": "vocab_size",
    "tied": "tie_word_embeddings",
    "positions": "max_position_embeddings",
    "rope": "rope_parameters",
}
SHAPES, HUB_SHAPES = {}, {}  # shapes by name; and the name, by the id of a Hub model
with Path(__file__).with_name("shapes.toml").open("rb") as _file:
    for _name, _shape in tomllib.load(_file).items():
        HUB_SHAPES |= dict.fromkeys(_shape.pop("hub", ()), _name)
        SHAPES[_name] = SimpleNamespace(**_shape)


def config_of(model) -> LlamaConfig:
    """The config of a shape's name, "embedded", a Hub id, a folder, or a LlamaConfig.

    Raises TypeError for another kind of config, ValueError for a model that is
    quantized or no Llama, and what base_folder raises.
    """
    if isinstance(model, LlamaConfig):
        return model
    if not isinstance(model, str | os.PathLike):
        raise TypeError(
            f"model is {type(model).__name__}, expected a LlamaConfig or a model's name"
        )
    if model in SHAPES or model in HUB_SHAPES:
        return llama_config(HUB_SHAPES.get(model, model))
    if "/" not in str(model) and model != EMBEDDED and not os.path.exists(model):
        raise FileNotFoundError(
            f"{model!r} is not known: give one of the shapes {list(SHAPES)}, "
            f"{EMBEDDED!r}, a folder, or a Hub id like {UNGATED!r}"
        )
    found, _ = LlamaConfig.get_config_dict(base_folder(model, weights=False))
    if found.get("model_type") != "llama":
        kind = found.get("model_type")
        raise ValueError(f"{model} is not a Llama (its model_type is {kind!r})")
    if "quantization_config" in found:
        raise ValueError(f"{model} is already quantized: give the model it came from")
    return LlamaConfig.from_dict(found)


def llama_config(shape: str) -> LlamaConfig:
    """The LlamaConfig of a shape of SHAPES. Raises ValueError for another name."""
    if not isinstance(shape, str) or shape not in SHAPES:
        raise ValueError(f"shape {shape!r} is unknown: take one of {list(SHAPES)}")
    numbers = {CONFIG_NAMES[key]: value for key, value in vars(SHAPES[shape]).items()}
    return LlamaConfig(**numbers, rms_norm_eps=1e-5)


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


PROJECTIONS = list(projections(LlamaConfig()))  # every linear layer of a Llama block
