"""Whether an adapter is complete and fits its base: where one is refused."""

from pathlib import Path

from peft import PeftModel
from transformers import AutoTokenizer, BitsAndBytesConfig

from qlora_helpers.model_files import open_weights, read_json

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
