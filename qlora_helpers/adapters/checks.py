"""Whether an adapter is complete and fits its base: where one is refused."""

from pathlib import Path

from transformers import AutoTokenizer, BitsAndBytesConfig

from qlora_helpers.model_files import read_json, tensor_shapes

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
NOTE = "base.json"  # says what the adapter was trained on
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
# What must be equal in two BitsAndBytesConfigs. The compute dtype may differ.
QUANTIZED = (
    "load_in_4bit load_in_8bit bnb_4bit_quant_type bnb_4bit_use_double_quant"
).split()
ROWS = (".embed_tokens.weight", ".lm_head.weight")  # they have a row for each token


def base_of(folder) -> dict:
    """What an adapter was trained on: name, revision, tensors_sha256, quantization.

    Raises FileNotFoundError if there is no adapter, and ValueError if the folder does
    not say what it was trained on.
    """
    folder = as_folder(folder)
    named = _config(folder).get("base_model_name_or_path")
    note = read_json(folder / NOTE, "name") if (folder / NOTE).exists() else {}
    if "tensors_sha256" not in note:
        raise ValueError(
            f"the adapter in the folder {folder} was not saved by save_adapter (it has "
            f"no {NOTE} with a hash of its base): load it onto its base {named!r} with "
            "PeftModel.from_pretrained, and save it with save_adapter"
        )
    return note


def as_folder(folder) -> Path:
    """The path of an adapter's folder. Raises ValueError for what is none."""
    if not isinstance(folder, str | Path) or not str(folder):
        raise ValueError(f"the adapter is {folder!r}: give the path of its folder")
    return Path(folder).expanduser()


def _config(folder: Path) -> dict:
    if not (folder / CONFIG).exists():
        raise FileNotFoundError(
            f"{folder} lacks {CONFIG}: it is not an adapter that save_adapter wrote"
        )
    return read_json(folder / CONFIG, "peft_type")


def tensor_names(folder: Path) -> set[str]:
    """The names of an adapter's tensors, from its file's header.

    Raises FileNotFoundError or ValueError for a file that is missing, cut or a pickle.
    """
    _config(folder)
    if not (folder / WEIGHTS).exists():
        pickles = [file for file in folder.iterdir() if file.suffix in PICKLES]
        if pickles:
            raise ValueError(
                f"{pickles[0]} is a pickle, and loading one can run any code: it is "
                f"not opened; ask its author for {WEIGHTS}"
            )
        raise FileNotFoundError(f"{folder} lacks {WEIGHTS}: copy the adapter again")
    return set(tensor_shapes(folder / WEIGHTS))


def check_identity(base) -> None:
    """Raise TypeError unless `base` is a dict of `models.base_identity`."""
    wanted = {"name", "revision", "tensors_sha256"}
    if not isinstance(base, dict) or not wanted <= set(base):
        raise TypeError(f"base is {base!r}: expected models.base_identity(...)")


def check_adapter(folder, base: dict, quantization=None) -> set[str]:
    """Check that an adapter is complete and fits `base`; return its tensors' names.

    `quantization`: the model's BitsAndBytesConfig; None for a model in 16 bits, which
    takes any adapter of its base. Raises what `load_adapter` raises.
    """
    folder = Path(folder).expanduser()
    check_identity(base)
    trained_on = base_of(folder)
    names = tensor_names(folder)
    there = {"tensors_sha256": trained_on["tensors_sha256"]}
    here = {"tensors_sha256": base["tensors_sha256"]}
    if quantization is not None and trained_on.get("quantization"):
        saved = BitsAndBytesConfig(**trained_on["quantization"])  # adds the defaults
        for key in QUANTIZED:
            there[key] = getattr(saved, key)
            here[key] = getattr(quantization, key, None)
    for key in there:
        if there[key] != here[key]:
            quantized = f", quantized as {NOTE} says" if key in QUANTIZED else ""
            raise ValueError(
                f"the adapter in the folder {folder} was trained on another base: "
                f"{key} is {there[key]!r} in its {NOTE} and {here[key]!r} in the "
                f"given base: load {trained_on['name']!r}, revision "
                f"{trained_on.get('revision')}{quantized}"
            )
    return names


def check_whole(folder, saved: set[str], wanted: set[str]) -> None:
    """Raise ValueError unless the saved tensors' names are those that PEFT wants."""
    if saved != wanted:
        others = sorted(saved - wanted)
        raise ValueError(
            f"{Path(folder) / WEIGHTS} holds {len(saved & wanted)} of the "
            f"{len(wanted)} tensors that {CONFIG} asks for, and {len(others)} others "
            f"{others[:1]}: save the adapter again, whole and without others"
        )


def token_rows(folder) -> int:
    """The rows that an adapter's own tokenizer needs; 0 if it brings no tokenizer."""
    if not (Path(folder) / "tokenizer_config.json").exists():
        return 0
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ValueError(
            f"the tokenizer in {folder} cannot be opened: copy its files again, or "
            "save a tokenizer that needs no code of its own"
        ) from error
    return 1 + max(tokenizer.get_vocab().values())


def saved_rows(folder: Path) -> int:
    """The rows for tokens that an adapter holds, both in and out; 0 if it has none."""
    shapes = tensor_shapes(folder / WEIGHTS)
    rows = [shapes[name][0] for name in shapes if name.endswith(ROWS)]
    return min(rows) if len(rows) == len(ROWS) else 0


def check_rows(folder: Path, of_base: int, of_model: int) -> None:
    """Raise ValueError if the adapter's file lacks the rows of added tokens.

    of_base: the rows of the base as it came. of_model: those of the model now.
    """
    needed = max(token_rows(folder), of_model)
    if needed > of_base and saved_rows(folder) < needed:
        raise ValueError(
            f"the base has rows for {of_base:,} tokens, but {needed:,} are needed, and "
            "those that the adapter lacks would be lost: train without added tokens, "
            "or with LoraConfig(modules_to_save=['embed_tokens', 'lm_head'])"
        )
