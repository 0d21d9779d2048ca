"""Adapters on disk: saved whole, and loaded onto their own base alone."""

import json
import os
import warnings
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from . import card, folders

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
NOTE = "base.json"  # what the adapter was trained on
PICKLES = (".bin", ".pt", ".pth", ".pkl")
QUANTIZED = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")  # what the base was
ROWS = ("embed_tokens.weight", "lm_head.weight")  # a row for each token


def save_adapter(model, tokenizer, folder, base: dict, dtype=None) -> Path:
    """Save the adapter that is switched on, with its tokenizer, card and base.

    `base` is `models.base_identity(name)`; peft alone would store a path of this
    machine. (Where the base is no Hub id, peft's AutoPeftModelForCausalLM cannot open
    the folder: load the base, then `load_adapter`.) `tokenizer` may be None where the
    base's is meant. `dtype` is what the adapter is stored in (left out: as it is). A
    folder that was saved before is replaced as a whole: there is never half of one.

    Raises FileExistsError or PermissionError for a folder that holds anything else,
    and ValueError where one adapter is not all that must be saved: several are switched
    on, or rows of added tokens would be lost.
    """
    name = _adapter_of(model)
    quantization = getattr(model.config, "quantization_config", None)
    facts = dict(base, quantization=quantization and quantization.to_diff_dict())
    with folders.written_whole(folder, NOTE, facts, {}) as made:
        # no look-up of the base's vocabulary on the Hub: `_check_rows` does better
        model.save_pretrained(
            made, selected_adapters=[name], save_embedding_layers=False
        )
        if name != "default":  # peft gives it a folder of its own
            for file in (made / name).iterdir():
                file.replace(made / file.name)
            (made / name).rmdir()
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
        rows = model.get_input_embeddings().weight.shape[0]
        _check_rows(made, base.get("rows") or rows, rows)
        if dtype is not None:
            kept = {n: t.to(dtype) for n, t in load_file(made / WEIGHTS).items()}
            save_file(kept, made / WEIGHTS, metadata={"format": "pt"})
        config = json.loads((made / CONFIG).read_text("utf-8"))
        config["base_model_name_or_path"] = base["name"]
        config["revision"] = base["revision"]
        text = json.dumps(config, indent=2, sort_keys=True)
        (made / CONFIG).write_text(text + "\n", encoding="utf-8")
        (made / card.CARD).unlink()  # peft's, with nothing filled in
        card.write_adapter_card(made, base)
    return Path(folder).expanduser()


def load_adapter(
    model, folder, base: dict, name: str = "default", trainable: bool = False
) -> PeftModel:
    """The model with the adapter of a folder that `save_adapter` wrote.

    `base` is `models.base_identity` of the model's base. A model that has adapters
    already gets this one beside them, as `name`; it is not switched on. `trainable`:
    to train it further; otherwise it is frozen.

    Raises FileNotFoundError or ValueError, in a sentence, for a folder that is none, is
    damaged or holds a pickle, and for an adapter of another base: peft would load it
    without a word, and it would answer nonsense.
    """
    folder = Path(folder).expanduser()
    quantization = getattr(model.config, "quantization_config", None)
    saved = check_adapter(folder, base, quantization)
    _fit_rows(model, folder)
    if isinstance(model, PeftModel):
        if name in model.peft_config:  # peft would keep the older one's alpha
            raise ValueError(
                f"the model has an adapter {name!r} already: give this one another "
                f"name, or remove that one with model.delete_adapter({name!r})"
            )
        model.load_adapter(folder, name, is_trainable=trainable)
    else:
        model = PeftModel.from_pretrained(
            model, folder, adapter_name=name, is_trainable=trainable
        )
    wanted = get_peft_model_state_dict(
        model, adapter_name=name, save_embedding_layers=False
    )
    if set(wanted) != saved:
        raise ValueError(
            f"{folder / WEIGHTS} holds {len(saved & set(wanted))} of the "
            f"{len(wanted)} tensors that {CONFIG} asks for: it was saved or copied in "
            "part; save it again"
        )
    return model


def adopt(folder, base: dict, quantization=None) -> None:
    """Say what an adapter that `save_adapter` did not write was trained on.

    It writes base.json beside the adapter of PEFT, TRL, Unsloth or LLaMA-Factory, and
    from then on the folder loads and merges like one of our own. `base` is
    `models.base_identity(name)`. `quantization` is the BitsAndBytesConfig that it was
    trained with, None for a base in 16 bits. Nothing can prove either: it is your word.

    Raises FileExistsError for an adapter that has its base.json, and what
    `check_adapter` raises for a folder that holds no adapter.
    """
    folder = Path(folder).expanduser()
    if (folder / NOTE).exists():
        raise FileExistsError(f"{folder} has its {NOTE} already: nothing to adopt")
    _names(folder)
    named = _config(folder).get("base_model_name_or_path")
    if base["name"] not in (named, Path(named or "").name):  # it can be a path
        warnings.warn(
            f"the adapter in {folder} names {named!r} as its base, and is adopted for "
            f"{base['name']!r}: only its author knows whether the weights are the same",
            stacklevel=2,
        )
    facts = dict(base, quantization=quantization and quantization.to_diff_dict())
    text = json.dumps(facts | {"adopted": True}, indent=1, default=str)
    beside = folder / f"{NOTE}.{os.getpid()}.part"
    beside.write_text(text + "\n", encoding="utf-8")
    beside.replace(folder / NOTE)


def base_of(folder) -> dict:
    """What an adapter was trained on: name, revision, tensors_sha256, quantization.

    Raises FileNotFoundError where there is no adapter, ValueError where it is not known
    what it was trained on.
    """
    folder = Path(folder).expanduser()
    facts = folder / NOTE
    if not (folder / CONFIG).exists():
        raise FileNotFoundError(
            f"{folder} holds no adapter: {CONFIG} is not there; expected a folder of "
            "save_adapter"
        )
    if not facts.exists():
        named = _config(folder).get("base_model_name_or_path")
        raise ValueError(
            f"the adapter in {folder} was not saved by save_adapter ({NOTE} is not "
            f"there); its config names {named!r} as its base: if that is right, say "
            f"so once with adapters.adopt({str(folder)!r}, "
            f"models.base_identity({named!r}), quantization), where quantization is "
            "the BitsAndBytesConfig that it was trained with, or None"
        )
    try:
        return json.loads(facts.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{facts} is damaged ({error}): copy it again") from None


def check_adapter(folder, base: dict, quantization=None) -> set[str]:
    """The names of an adapter's tensors, once all is there and the base is its own.

    It needs no model, so that it can be asked before one is loaded. `quantization` is
    the BitsAndBytesConfig of the model; None, for one that is not quantized, passes:
    into such a model adapters are merged.

    Raises what `load_adapter` raises; nothing but safetensors is ever opened.
    """
    folder = Path(folder).expanduser()
    trained_on = base_of(folder)
    names = _names(folder)
    keys = ("tensors_sha256",)
    if not all(facts.get("tensors_sha256") for facts in (trained_on, base)):
        keys = ("name", "revision")  # saved by an older version of this package
    for key in keys:
        there, here = trained_on.get(key), base.get(key)
        if there is None or there != here:
            known = f"{trained_on.get('name')!r}, revision {trained_on.get('revision')}"
            raise ValueError(
                f"the adapter in {folder} was trained on another base: {key} is "
                f"{there!r} there and {here!r} here: load {known}"
            )
    trained_in = trained_on.get("quantization")
    for key in QUANTIZED if quantization is not None and trained_in else ():
        here = getattr(quantization, key, None)
        if trained_in.get(key) != here:
            raise ValueError(
                f"the adapter in {folder} was trained with {key}="
                f"{trained_in.get(key)!r}, and this model has {here!r}: load the base "
                "with train.nf4_config(env.profile())"
            )
    return names


def token_rows(folder) -> int:
    """The rows that an adapter's own tokenizer needs: 0 where it brings none."""
    if not (Path(folder) / "tokenizer_config.json").exists():
        return 0
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return 1 + max(tokenizer.get_vocab().values())


def _adapter_of(model) -> str:
    """The name of the one adapter that is switched on."""
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"the model is a {type(model).__name__} without an adapter: expected a "
            "model of get_peft_model or load_adapter"
        )
    names = model.active_adapters
    if len(names) != 1:
        raise ValueError(
            f"the adapters {names} are switched on, and one folder holds one adapter: "
            "switch on the one to save with model.set_adapter(name)"
        )
    return names[0]


def _config(folder: Path) -> dict:
    return json.loads((folder / CONFIG).read_text(encoding="utf-8"))


def _names(folder: Path) -> set[str]:
    """The names of the tensors in an adapter's folder, from the header of its file."""
    weights = folder / WEIGHTS
    if not (folder / CONFIG).exists():
        raise FileNotFoundError(f"{folder} lacks {CONFIG}: copy it again")
    if not weights.exists():
        pickles = [file.name for file in folder.iterdir() if file.suffix in PICKLES]
        if pickles:
            raise ValueError(
                f"{folder / pickles[0]} is a pickle, and loading one can run any code: "
                f"it is not opened; ask its author for {WEIGHTS}"
            )
        raise FileNotFoundError(f"{folder} lacks {WEIGHTS}: copy it again")
    try:
        with safe_open(weights, "pt") as opened:
            return set(opened.keys())
    except SafetensorError as error:
        raise ValueError(
            f"{weights} is damaged or cut short ({error}): copy it again"
        ) from None


def _saved_rows(folder: Path) -> int:
    """The rows for tokens that an adapter holds, in and out; 0 where it holds none."""
    found = dict.fromkeys(ROWS, 0)
    with safe_open(folder / WEIGHTS, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118 (no dict)
            for row in ROWS:
                if name.endswith(f".{row}"):
                    found[row] = opened.get_slice(name).get_shape()[0]
    return min(found.values())


def _check_rows(folder: Path, of_base: int, of_model: int) -> None:
    """Raise ValueError where rows of added tokens are not in the adapter's own file."""
    needed = max(token_rows(folder), of_model if of_model > of_base else 0)
    if needed > of_base and _saved_rows(folder) < needed:
        raise ValueError(
            f"the base has rows for {of_base:,} tokens and {needed:,} are needed: the "
            "rows of the added tokens are not part of this adapter and would be lost; "
            "train without added tokens, or with LoraConfig(modules_to_save="
            "['embed_tokens', 'lm_head'])"
        )


def _fit_rows(model, folder: Path) -> None:
    """Give a fresh base the rows that the adapter brings, or raise ValueError."""
    have = model.get_input_embeddings().weight.shape[0]
    rows = _saved_rows(folder)
    if rows and rows != have and not isinstance(model, PeftModel):
        model.resize_token_embeddings(rows, mean_resizing=False)
        return
    _check_rows(folder, have, have)
