"""Where a base model comes from: a folder, the Hub, or the embedded Llama."""

import re
from collections import namedtuple
from pathlib import Path

from huggingface_hub import errors, snapshot_download
from transformers import AutoConfig

from qlora_helpers import model_files
from qlora_helpers.env import UNGATED
from qlora_helpers.model_files import INDEX, read_json
from qlora_helpers.models.embedded import SMOLLM2, embedded_dir

EMBEDDED = "embedded"
ADAPTER = "adapter_config.json"  # PEFT's file, which marks an adapter
# name: as load_base takes it; parameters: tied ones count once; gated: True if the Hub
# asks a reader to accept the licence first
KnownModel = namedtuple("KnownModel", "name parameters licence gated")
KNOWN_MODELS = [
    KnownModel(EMBEDDED, 134_515_008, "Apache-2.0", False),
    KnownModel(UNGATED, 1_711_376_384, "Apache-2.0", False),
    KnownModel("meta-llama/Llama-3.2-1B", 1_235_814_400, "Llama 3.2", True),
    KnownModel("meta-llama/Llama-3.2-3B", 3_212_749_824, "Llama 3.2", True),
    KnownModel("meta-llama/Llama-3.1-8B", 8_030_261_248, "Llama 3.1", True),
]


def base_folder(name=EMBEDDED, revision=None, weights: bool = True) -> Path:
    """The folder of a base: "embedded", a folder, or a Hub id, which is fetched.

    revision: a commit, tag or branch of the Hub id; by default the newest commit, or
    the cached one without a network. weights: False to fetch only the small files.

    Raises PermissionError (gated), ConnectionError (no network), FileNotFoundError (no
    model), ValueError (an adapter, a revision without a Hub id), and the Hub's errors.
    """
    if not isinstance(name, str | Path):
        raise ValueError(
            f"the base is {name!r}: give {EMBEDDED!r}, a folder, or a Hub id"
        )
    here = embedded_dir() if name == EMBEDDED else Path(name).expanduser()
    on_hub = not here.is_dir() or not str(name)
    if revision is not None and not on_hub:
        raise ValueError(
            f"revision={revision!r} for {name!r}: only a model of the Hub has revisions"
        )
    if on_hub:
        small = [*model_files.CONFIGS, *model_files.TOKENIZER, INDEX, ADAPTER]
        here = _fetch(str(name), revision, small)
    if (here / ADAPTER).exists():
        config = read_json(here / ADAPTER, "peft_type")
        base = config.get("base_model_name_or_path") or "not named"
        raise ValueError(
            f"{name} is an adapter, but a base model was expected: load its base "
            f"({base}), then put the adapter on it with adapters.load_adapter"
        )
    if not (here / "config.json").exists():
        raise FileNotFoundError(f"{name} holds no config.json, so it is no model")
    if on_hub and weights:
        files = [model_files.SINGLE]
        if (here / INDEX).exists():
            files += read_json(here / INDEX, "weight_map")["weight_map"].values()
        # A repository can hold a second set of weights, which transformers ignores.
        _fetch(str(name), here.name, files)
    return here


def _fetch(name: str, revision, files: list[str]) -> Path:
    """The snapshot of a Hub id, with these files where the repository has them."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise FileNotFoundError(
            f"{name!r} is neither {EMBEDDED!r}, nor a directory here, nor a Hub id"
        )
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except errors.GatedRepoError:  # 401: not logged in; 403: licence not accepted
        raise PermissionError(
            f"{name} is gated and you have no access yet: accept its licence on "
            f"https://huggingface.co/{name} and log in (`hf auth login`, or set "
            f"HF_TOKEN), or take the ungated {UNGATED}"
        ) from None
    except errors.LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"{name} is not whole in this machine's cache, and the Hub does not answer:"
            f" load it once with a network, or take {EMBEDDED!r}"
        ) from error


def base_identity(name=EMBEDDED, revision=None) -> dict:
    """What an adapter's note must say of its base. Raises what base_folder does.

    name: never a path. revision: the commit of a Hub id, the hash of the embedded
    model's wheel, else None. tensors_sha256. rows: of the embedding, one per token.
    """
    folder = base_folder(name, revision)
    if name == EMBEDDED:
        called, commit = f"{SMOLLM2.requirement}/{SMOLLM2.folder}", SMOLLM2.sha256
    elif Path(name).expanduser().is_dir():
        called, commit = folder.resolve().name, None
    else:
        called, commit = str(name), folder.name  # .../snapshots/COMMIT
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return {
        "name": called,
        "revision": commit,
        "tensors_sha256": model_files.tensors_sha256(folder),
        "rows": config.get_text_config().vocab_size,
    }
