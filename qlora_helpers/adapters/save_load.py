"""Adapters on disk: saved whole, and loaded only onto their own base."""

import json
import warnings
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from qlora_helpers import card, folders
from qlora_helpers.adapters.checks import (
    CONFIG,
    NOTE,
    WEIGHTS,
    _check_identity,
    _check_rows,
    _config,
    _fit_rows,
    base_of,
    check_adapter,
    check_whole,
    tensor_names,
)
from qlora_helpers.model_files import write_whole


def save_adapter(model, tokenizer, folder, base: dict, dtype=None) -> Path:
    """Save the active adapter with its tokenizer, its card and a note on its base.

    `base` is `models.base_identity(name)`; PEFT by itself would store a path of this
    machine. (If the base is not a Hub id, PEFT's AutoPeftModelForCausalLM cannot open
    the folder: load the base, then call `load_adapter`.) `tokenizer` may be None if it
    is the base's. `dtype` is the dtype to store the adapter in; by default its own. An
    adapter that was saved there before is replaced as a whole, never in part.

    Raises FileExistsError or PermissionError for a folder that holds anything else,
    and ValueError if saving one adapter would lose something: several adapters are
    active, or the adapter does not hold the rows of added tokens.
    """
    name = _adapter_of(model)
    _check_identity(base)
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"dtype is {dtype!r}: give torch.float32, bfloat16 or float16, or None for "
            "the adapter's own"
        )
    quantization = getattr(model.config, "quantization_config", None)
    facts = dict(base, quantization=quantization and quantization.to_diff_dict())
    with folders.written_whole(folder, NOTE, facts, {}) as made:
        # PEFT would look up the base's vocabulary on the Hub; `_check_rows` does better
        model.save_pretrained(
            made, selected_adapters=[name], save_embedding_layers=False
        )
        if name != "default":  # PEFT gives it a folder of its own
            for file in (made / name).iterdir():
                file.replace(made / file.name)
            (made / name).rmdir()
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
        rows = model.get_input_embeddings().weight.shape[0]
        _check_rows(made, base.get("rows") or rows, rows)
        kept = {n: t.to(dtype or t.dtype) for n, t in load_file(made / WEIGHTS).items()}
        if bad := [n for n, t in kept.items() if not t.isfinite().all()]:
            raise ValueError(
                f"{bad[0]} holds NaN or infinity{f' in {dtype}' if dtype else ''}: if "
                "the training diverged, train again with half the learning_rate; else "
                "leave dtype out"
            )
        if dtype is not None:
            save_file(kept, made / WEIGHTS, metadata={"format": "pt"})
        config = json.loads((made / CONFIG).read_text("utf-8"))
        config["base_model_name_or_path"] = base["name"]
        config["revision"] = base["revision"]
        text = json.dumps(config, indent=2, sort_keys=True)
        (made / CONFIG).write_text(text + "\n", encoding="utf-8")
        (made / card.CARD).unlink()  # PEFT's card, with nothing filled in
        card.write_adapter_card(made, base)
    return Path(folder).expanduser()


def check_place(folder) -> None:
    """Raise what `save_adapter` would raise if it may not write to `folder`."""
    folders.check_out(folder, NOTE, {})


def load_adapter(
    model, folder, base: dict, name: str = "default", trainable: bool = False
) -> PeftModel:
    """Return the model with the adapter of a folder that `save_adapter` wrote.

    `base` is `models.base_identity` of the model's base. If the model already has
    adapters, this one is added as `name` and is not made active. `trainable`: True to
    train it further; otherwise it is frozen.

    Raises FileNotFoundError or ValueError, in a sentence, for a folder that holds no
    adapter, is damaged or holds a pickle, and for an adapter of another base: PEFT
    would load it without a warning, and it would answer nonsense.
    """
    folder = Path(folder).expanduser()
    if "." in name or not name:
        raise ValueError(f"name is {name!r}: give one that is not empty, without dots")
    quantization = getattr(model.config, "quantization_config", None)
    saved = check_adapter(folder, base, quantization)
    _fit_rows(model, folder)
    if not isinstance(model, PeftModel) and any(
        isinstance(module, BaseTunerLayer) for module in model.modules()
    ):
        raise ValueError(
            "this base already carries adapter layers, because an adapter was put on "
            "it before: give the PeftModel that was returned then and another name, or "
            "load the base again"
        )
    if isinstance(model, PeftModel) and name in model.peft_config:
        raise ValueError(  # PEFT would keep the older adapter's alpha
            f"the model already has an adapter {name!r}: give the new one another "
            f"name, or remove the old one with model.delete_adapter({name!r})"
        )
    given = model
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(folder, name, is_trainable=trainable)
        else:
            model = PeftModel.from_pretrained(
                model, folder, adapter_name=name, is_trainable=trainable
            )
        wanted = get_peft_model_state_dict(
            model, adapter_name=name, save_embedding_layers=False
        )
        check_whole(folder, saved, set(wanted))
    except (RuntimeError, ValueError) as error:
        # or it would be in the way of the right one
        if not isinstance(given, PeftModel):
            _strip(given)
        elif name in given.peft_config:
            given.delete_adapter(name)
        if isinstance(error, ValueError):
            raise
        raise ValueError(
            f"the tensors in {folder} do not fit the model or their {CONFIG} "
            f"({str(error).splitlines()[-1].strip()}): save or copy the adapter again"
        ) from None
    return model


def _strip(base) -> None:
    """Take away what PEFT put into a base before it raised an error."""
    for path, module in list(base.named_modules()):
        if isinstance(module, BaseTunerLayer):
            base.set_submodule(path, module.get_base_layer())
        elif isinstance(module, AuxiliaryTrainingWrapper):
            base.set_submodule(path, module.original_module)
    vars(base).pop("peft_config", None)


def adopt(folder, base: dict, quantization=None) -> None:
    """State what an adapter that `save_adapter` did not write was trained on.

    This writes base.json beside an adapter of PEFT, TRL, Unsloth or LLaMA-Factory. From
    then on the folder loads and merges like one that `save_adapter` wrote. `base` is
    `models.base_identity(name)`. `quantization` is the BitsAndBytesConfig that it was
    trained with, or None for a base in 16 bits. Nothing can check what you state.

    Raises FileExistsError for an adapter that already has its base.json, and what
    `check_adapter` raises for a folder that holds no adapter.
    """
    folder = Path(folder).expanduser()
    _check_identity(base)
    if quantization is not None and not isinstance(quantization, BitsAndBytesConfig):
        raise TypeError(
            f"quantization is a {type(quantization).__name__}: expected the "
            "BitsAndBytesConfig that the adapter was trained with, or None"
        )
    if (folder / NOTE).exists() and base_of(folder).get("tensors_sha256"):
        raise FileExistsError(
            f"{folder} already has its {NOTE}: load it with load_adapter"
        )
    tensor_names(folder)
    named = _config(folder).get("base_model_name_or_path")
    if base["name"] not in (named, Path(named or "").name):  # `named` can be a path
        warnings.warn(
            f"the adapter in {folder} names {named!r} as its base but is adopted for "
            f"{base['name']!r}: make sure that both have the same weights",
            stacklevel=2,
        )
    facts = dict(base, quantization=quantization and quantization.to_diff_dict())
    text = json.dumps(facts | {"adopted": True}, indent=1, default=str)
    write_whole(folder / NOTE, text)


def _adapter_of(model) -> str:
    """The name of the active adapter. Raises ValueError unless there is exactly one."""
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"the model is a {type(model).__name__} without an adapter: give a model "
            "that get_peft_model or load_adapter returned"
        )
    if sum(isinstance(module, PeftModel) for module in model.modules()) > 1:
        raise ValueError(
            "the model is a PeftModel within a PeftModel, because get_peft_model was "
            "called twice, and one folder holds one adapter: load the base again, and "
            "call get_peft_model once"
        )
    names = model.active_adapters
    if len(names) != 1:
        raise ValueError(
            f"the adapters {names} are active, but one folder holds one adapter: make "
            "the one to save active with model.set_adapter(name)"
        )
    return names[0]
