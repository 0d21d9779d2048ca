"""Adapters on disk: saved whole, and loaded only onto their own base."""

import json
import os
import warnings
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BitsAndBytesConfig

from . import card, folders
from .models import open_weights, read_json

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
NOTE = "base.json"  # says what the adapter was trained on
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
# of a base's BitsAndBytesConfig: must be equal
QUANTIZED = (
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
)
ROWS = ("embed_tokens.weight", "lm_head.weight")  # they have a row for each token


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


def check_whole(folder, saved: set[str], wanted: set[str]) -> None:
    """Raise ValueError unless an adapter holds the tensors that its config asks for.

    saved, wanted: their names, as PEFT writes them.
    """
    if more := sorted(saved - wanted):
        raise ValueError(
            f"{Path(folder) / WEIGHTS} also holds {more[0]}, which {CONFIG} does not "
            "ask for: save the adapter again without it"
        )
    if saved != wanted:
        raise ValueError(
            f"{Path(folder) / WEIGHTS} holds {len(saved)} of the {len(wanted)} tensors "
            f"that {CONFIG} asks for: the adapter was saved or copied in part; save it "
            "again"
        )


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
    beside = folder / f"{NOTE}.{os.getpid()}.part"
    beside.write_text(text + "\n", encoding="utf-8")
    beside.replace(folder / NOTE)


def base_of(folder) -> dict:
    """What an adapter was trained on: name, revision, tensors_sha256, quantization.

    Raises FileNotFoundError if there is no adapter, and ValueError if the folder does
    not say what it was trained on.
    """
    folder = Path(folder).expanduser()
    facts = folder / NOTE
    if not (folder / CONFIG).exists():
        raise FileNotFoundError(
            f"{folder} holds no {CONFIG}, so it is not an adapter: give a folder that "
            "save_adapter wrote"
        )
    if not facts.exists():
        named = _config(folder).get("base_model_name_or_path")
        raise ValueError(
            f"the adapter in {folder} was not saved by save_adapter (it has no {NOTE}) "
            f"and its config names {named!r} as its base: if that is right, state it "
            f"once with adapters.adopt({str(folder)!r}, "
            f"models.base_identity({named!r}), quantization), where quantization is "
            "the BitsAndBytesConfig that it was trained with, or None"
        )
    return read_json(facts, "name")


def check_adapter(folder, base: dict, quantization=None) -> set[str]:
    """Check that an adapter is complete and fits `base`; return its tensors' names.

    The check needs no model, so it can run before one is loaded. `quantization` is the
    BitsAndBytesConfig of the model. None, for a model that is not quantized, always
    passes, because adapters are merged into such a model.

    Raises what `load_adapter` raises. No weights but safetensors are ever opened.
    """
    folder = Path(folder).expanduser()
    _check_identity(base)
    trained_on = base_of(folder)
    names = tensor_names(folder)
    keys = ("tensors_sha256",)
    if not trained_on.get("tensors_sha256"):  # of an older version of this package
        keys = ("name", "revision")
        if trained_on.get("revision") is None:
            raise ValueError(
                f"the {NOTE} in {folder} has neither a hash nor a revision of the base:"
                f" if the adapter was trained on {base['name']!r}, state that once with"
                " adapters.adopt()"
            )
    for key in keys:
        there, here = trained_on.get(key), base.get(key)
        if there is None or there != here:
            known = f"{trained_on.get('name')!r}, revision {trained_on.get('revision')}"
            raise ValueError(
                f"the adapter in {folder} was trained on another base: {key} is "
                f"{there!r} in its {NOTE} and {here!r} in the given base: load {known}"
            )
    trained_in = trained_on.get("quantization")
    if quantization is None or not trained_in:
        return names
    there = BitsAndBytesConfig(**trained_in)  # with the defaults, which were left out
    for key in QUANTIZED:
        if getattr(there, key) != getattr(quantization, key, None):
            raise ValueError(
                f"the adapter in {folder} was trained with {key}="
                f"{getattr(there, key)!r}, but this model has "
                f"{getattr(quantization, key, None)!r}: load the base with the "
                f"quantization that {NOTE} gives"
            )
    return names


def token_rows(folder) -> int:
    """The rows that an adapter's own tokenizer needs; 0 if it brings no tokenizer."""
    if not (Path(folder) / "tokenizer_config.json").exists():
        return 0
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"the tokenizer in {folder} cannot be opened ({why}): copy its files "
            "again, or save a tokenizer that needs no code of its own"
        ) from None
    return 1 + max(tokenizer.get_vocab().values())


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


def _check_identity(base) -> None:
    """Raise TypeError unless `base` is a dict of `models.base_identity`."""
    if not isinstance(base, dict) or not {"name", "revision"} <= set(base):
        raise TypeError(
            f"base is {base!r}: expected models.base_identity(...) of the base"
        )


def _config(folder: Path) -> dict:
    return read_json(folder / CONFIG, "peft_type")


def tensor_names(folder: Path) -> set[str]:
    """The names of the tensors in an adapter's folder, from the header of its file."""
    weights = folder / WEIGHTS
    if not (folder / CONFIG).exists():
        raise FileNotFoundError(f"{folder} lacks {CONFIG}: copy the adapter again")
    _config(folder)
    if not weights.exists():
        pickles = [file.name for file in folder.iterdir() if file.suffix in PICKLES]
        if pickles:
            raise ValueError(
                f"{folder / pickles[0]} is a pickle, and loading one can run any code: "
                f"it is not opened; ask its author for {WEIGHTS}"
            )
        raise FileNotFoundError(f"{folder} lacks {WEIGHTS}: copy the adapter again")
    with open_weights(weights) as opened:
        return set(opened.keys())


def _saved_rows(folder: Path) -> int:
    """The rows for tokens that an adapter holds, both in and out; 0 if it has none."""
    found = dict.fromkeys(ROWS, 0)
    with open_weights(folder / WEIGHTS) as opened:
        for name in opened.keys():  # noqa: SIM118 (no dict)
            for row in ROWS:
                if name.endswith(f".{row}"):
                    found[row] = opened.get_slice(name).get_shape()[0]
    return min(found.values())


def _check_rows(folder: Path, of_base: int, of_model: int) -> None:
    """Raise ValueError if the adapter's file lacks the rows of added tokens."""
    needed = max(token_rows(folder), of_model if of_model > of_base else 0)
    if needed > of_base and _saved_rows(folder) < needed:
        raise ValueError(
            f"the base has rows for {of_base:,} tokens, but {needed:,} are needed: the "
            "adapter does not hold the rows of the added tokens, which would be lost; "
            "train without added tokens, or with LoraConfig(modules_to_save="
            "['embed_tokens', 'lm_head'])"
        )


def _fit_rows(model, folder: Path) -> None:
    """Resize a fresh base to the rows that the adapter brings, or raise ValueError."""
    have = model.get_input_embeddings().weight.shape[0]
    rows = _saved_rows(folder)
    if rows and rows != have and not isinstance(model, PeftModel):
        model.resize_token_embeddings(rows, mean_resizing=False)
        return
    _check_rows(folder, have, have)
