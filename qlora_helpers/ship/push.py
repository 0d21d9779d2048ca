"""Put a merged model or an adapter on the Hub."""

import re
from pathlib import Path

from huggingface_hub import HfApi, errors, get_token

from qlora_helpers.adapters import CONFIG, PICKLES, tensor_names
from qlora_helpers.model_files import open_weights, read_json, weight_files


def push(folder, repo_id: str, private: bool = True) -> str:
    """Upload a folder as a model repository; the address of the commit.

    folder: what `merge.merge_folder` or `adapters.save_adapter` wrote, with a card; all
    that is in it goes up. `private` is for a new repository: one that is there stays
    as private or public as it is. The Hub's address is HF_ENDPOINT's.

    Raises FileNotFoundError where the folder holds no *.safetensors, ValueError where
    it holds damaged or pickled weights or has no README.md (a model without its card),
    and PermissionError where there is no token or the Hub does not let it write. The
    Hub hears nothing before the folder is in order.
    """
    folder = Path(folder).expanduser()
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{folder} holds no *.safetensors: expected a merged model or an adapter; "
            "merge or save it there first"
        )
    # in its folders too: a Trainer's checkpoints hold optimizer.pt
    pickles = [file for file in folder.rglob("*") if file.suffix.lower() in PICKLES]
    if pickles:
        raise ValueError(
            f"{sorted(pickles)[0]} is a pickle, and loading one can run any code: "
            "expected weights only in *.safetensors; move the file out of the folder"
        )
    if (folder / CONFIG).exists():
        tensor_names(folder)
    else:
        read_json(folder / "config.json", "model_type")
        for file in weight_files(folder):
            open_weights(file)
    card = folder / "README.md"
    if not card.is_file() or not card.read_text("utf-8").strip():
        raise ValueError(
            f"{folder} has no README.md, or an empty one: expected a card that says "
            "what the model is, its base and its licence; write a card, for example "
            "with card.write_card or card.write_adapter_card"
        )
    token = get_token()
    if token is None:
        raise PermissionError(
            f"no token to write to {repo_id} with: log in (`hf auth login`), or set "
            "HF_TOKEN to one with write access"
        )
    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo.repo_id,  # with the owner, where only a name was given
            folder_path=folder,
            commit_message=f"Upload {folder.resolve().name}",
        )
    except (errors.HfHubHTTPError, ConnectionError) as error:
        status = _status(error)
        if status not in (401, 403):
            raise
        raise PermissionError(
            f"the Hub does not let this token write to {repo_id} ({status}): expected "
            "one with write access there; log in with it (`hf auth login`), or set "
            "HF_TOKEN"
        ) from None
    return commit.commit_url


def _status(error) -> int | None:
    """The Hub's answer as a number, where there was one."""
    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code
    # hf_xet, which uploads the weights, calls each one a network error
    found = re.search(r"HTTP status \w+ error \((\d+)", str(error))
    return int(found[1]) if found else None
