"""Put a merged model or an adapter on the Hub."""

from pathlib import Path

from huggingface_hub import HfApi

from qlora_helpers.adapters import CONFIG, PICKLES, tensor_names
from qlora_helpers.model_files import read_json, weight_files


def push(folder, repo_id: str, private: bool = True) -> str:
    """Upload a folder as a model repository; return the address of the commit.

    folder: what `merge.merge_folder` or `adapters.save_adapter` wrote, with its card;
    everything in it is uploaded. private: for a new repository; one that exists stays
    as it is. The Hub's address is HF_ENDPOINT's.

    Raises, before the Hub is asked, FileNotFoundError for a missing file, ValueError
    for damaged or pickled weights or a missing card, and LocalTokenNotFoundError;
    then HfHubHTTPError or ConnectionError where the Hub refuses it (401, 403).
    """
    folder = Path(folder).expanduser()
    # in its folders too: a Trainer's checkpoints hold optimizer.pt
    pickles = [file for file in folder.rglob("*") if file.suffix.lower() in PICKLES]
    if pickles:
        raise ValueError(
            f"{min(pickles)} is a pickle, and loading one can run any code: move the "
            "file out of the folder"
        )
    if (folder / CONFIG).exists():
        tensor_names(folder)
    else:
        read_json(folder / "config.json", "model_type")
        weight_files(folder)
    card = folder / "README.md"
    if not card.is_file() or not card.read_text("utf-8").strip():
        raise ValueError(
            f"{folder} has no README.md, or an empty one: write it with card.write_card"
        )
    api = HfApi(token=True)  # raises an error where no token is found
    repo = api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo.repo_id,  # with the owner, where only a name was given
        folder_path=folder,
        commit_message=f"Upload {folder.resolve().name}",
    )
    return commit.commit_url
