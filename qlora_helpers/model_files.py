"""Files of models: safetensors and JSON read with clear errors, text written whole."""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
# What belongs to a model beside its weights.
TOKENIZER = (
    "tokenizer* special_tokens_map.json added_tokens.json vocab.* merges.txt *.model"
    " *.tiktoken *.jinja chat_template.json additional_chat_templates*"
).split()
CONFIGS = ("config.json", "generation_config.json")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files(folder) -> list[Path]:
    """The safetensors files of a model's folder that transformers reads, in order.

    Raises FileNotFoundError if one is missing, ValueError if one is damaged. Source:
    transformers/modeling_utils.py, _get_resolved_checkpoint_files.
    """
    folder = Path(folder)
    if (folder / SINGLE).is_file():
        names = [SINGLE]
    elif (folder / INDEX).is_file():
        index = read_json(folder / INDEX, "weight_map")
        names = sorted(set(index["weight_map"].values()))
    else:
        raise FileNotFoundError(
            f"{folder} holds no {SINGLE} and no {INDEX}: give a model's folder"
        )
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} lacks {name}, which its {INDEX} names: copy that file"
            )
        open_weights(folder / name)
    return [folder / name for name in names]


def has_tokenizer(folder: Path) -> bool:
    """True if the folder holds a tokenizer's vocabulary."""
    return any((folder / name).exists() for name in VOCABULARIES)


def read_json(file: Path, key: str) -> dict:
    """The JSON object in a file. Raises ValueError unless it is one that has `key`."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): copy it again") from None
    if not isinstance(found, dict) or key not in found:
        raise ValueError(f"{file} is damaged (it has no {key!r}): copy it again")
    return found


def open_weights(file):
    """A safetensors file, opened. Raises ValueError if it is damaged or cut short."""
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise ValueError(
            f"{file} is damaged or cut short ({error}): copy the file again"
        ) from None


def tensor_shapes(file) -> dict[str, list[int]]:
    """The shape of each tensor in a safetensors file, read from its header."""
    with open_weights(file) as opened:
        names = opened.keys()
        return {name: opened.get_slice(name).get_shape() for name in names}


def tensors_sha256(folder) -> str:
    """SHA-256 of a model's tensors, in hex; equal weights have equal hashes.

    It covers each tensor's name, dtype, shape and bytes, sorted by name, so neither the
    folder nor the split into files matters. It reads about 1 GB a second.
    """
    found = {}
    for file in weight_files(folder):
        with open_weights(file) as opened:
            for name in tqdm(opened.keys(), desc=f"hashing {file.name}", delay=5):
                tensor = opened.get_tensor(name)
                digest = hashlib.sha256(f"{tensor.dtype} {[*tensor.shape]}".encode())
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
                found[name] = digest.hexdigest()
    listed = "".join(f"{name} {found[name]}\n" for name in sorted(found))
    return hashlib.sha256(listed.encode()).hexdigest()


def sha256(file) -> str:
    """SHA-256 of a file, in hex (about 1 GB a second)."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file: the whole new one replaces the old one, or nothing changes.

    A text is written as UTF-8 and ends with one line break. The file's folder is made.
    """
    if isinstance(content, str):
        content = (content.rstrip("\n") + "\n").encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        beside.write_bytes(content)
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)
