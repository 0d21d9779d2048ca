"""Pushing to the Hub: whole and private, or refused before anything is created."""

import json
import pathlib

import hub_server
import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants, errors, snapshot_download
from peft import get_peft_model
from safetensors.torch import save_file

from qlora_helpers import adapters, card, env, model_files, models, train
from qlora_helpers.ship import push

TOKEN = "hf_test"
READABLE = "own/readable"  # there, but not to be written to
REFUSALS = {"own/unknown": (401, "Unauthorized"), "own/refused": (403, "Forbidden")}
CARD = "---\nlicense: apache-2.0\n---\n# A model\n"


@pytest.fixture
def folder(tmp_path):
    """What push takes: two shards, a config and a card."""
    folder = tmp_path / "a model"
    folder.mkdir()
    where = {}
    for part in (1, 2):
        file = f"model-0000{part}-of-00002.safetensors"
        save_file({f"tensor {part}": torch.full((100_000,), part)}, folder / file)
        where[f"tensor {part}"] = file
    index = json.dumps({"metadata": {}, "weight_map": where})
    (folder / model_files.INDEX).write_text(index, "utf-8")
    (folder / "config.json").write_text('{"model_type": "llama"}\n', "utf-8")
    (folder / "README.md").write_text(CARD, "utf-8")
    return folder


@pytest.fixture
def server(folder, tmp_path, monkeypatch):
    """A Hub on loopback, and this process logged in to it."""
    repos, uploads = {READABLE: folder}, tmp_path / "uploads"
    with hub_server.serve(repos, REFUSALS, uploads=uploads) as server:
        # huggingface_hub has read its variables already
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        huggingface_hub.close_session()  # an older one may have a proxy
        yield server
    huggingface_hub.close_session()


def contents(folder):
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def test_what_was_pushed_comes_back_and_is_private(server, folder, tmp_path):
    (folder / "more").mkdir()
    (folder / "more/notes.txt").write_text("kept\n", "utf-8")
    address = push.push(folder, "own/new")
    assert address == f"{server.url}/own/new/commit/{hub_server.COMMIT}"
    assert server.created == {"own/new": True}
    assert HfApi().model_info("own/new").private is True
    assert sum(method == "PUT" for method, _, _ in server.seen) == 2  # both by LFS

    back = snapshot_download("own/new", cache_dir=tmp_path / "cache")
    assert contents(pathlib.Path(back)) == contents(folder)
    with pytest.raises(errors.RepositoryNotFoundError):  # so private it is
        snapshot_download("own/new", cache_dir=tmp_path / "other", token=False)


def test_pushed_again_the_new_files_are_there(server, folder, tmp_path):
    push.push(folder, "own/new", private=False)
    (folder / "config.json").write_text('{"model_type": "mistral"}', "utf-8")
    push.push(folder, "own/new")
    assert server.created == {"own/new": False}  # a repository stays what it was
    assert contents(tmp_path / "uploads/own/new") == contents(folder)


def test_an_adapter_is_saved_gets_its_card_and_is_pushed(server, tmp_path):
    base = {"name": "own/base", "revision": "a" * 40, "tensors_sha256": "0" * 64}
    quantized = models.random_llama("tiny", train.nf4_config(env.profile()))
    model = get_peft_model(quantized, train.lora_config(4, 8))
    folder = adapters.save_adapter(model, None, tmp_path / "adapter", base)
    facts = {"data": "night trains", "licence": "Llama 3.2", "system": None}
    card.write_adapter_card(folder, base, facts)
    push.push(folder, "own/adapter")
    back = pathlib.Path(snapshot_download("own/adapter", cache_dir=tmp_path / "cache"))
    found = ModelCard.load(back / "README.md").data
    assert (found.base_model, found.base_model_relation) == ("own/base", "adapter")
    assert (found.library_name, found.license) == ("peft", "llama3.2")
    assert adapters.base_of(back)["name"] == "own/base"
    assert contents(back) == contents(folder)


def test_a_name_alone_is_the_readers_own(server, folder):
    assert "/me/new/commit/" in push.push(folder, "new")
    assert server.created == {"me/new": True}


@pytest.mark.parametrize("given", [None, ""])
def test_without_a_token_nothing_is_asked(given, server, folder, monkeypatch):
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.delenv("HF_TOKEN")
    if given is not None:
        monkeypatch.setenv("HF_TOKEN", given)
    with pytest.raises(errors.LocalTokenNotFoundError, match="hf auth login"):
        push.push(folder, "own/new")
    assert server.seen == []


@pytest.mark.parametrize("name", ["a.bin", "a.pt", "a.PTH", "checkpoint-1/a.pkl"])
def test_a_pickle_is_named_and_stays_here(name, server, folder):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{name} is a pickle"):
        push.push(folder, "own/new")
    assert server.seen == []


def test_a_model_without_its_card_stays_here(server, folder):
    (folder / "README.md").unlink()
    with pytest.raises(ValueError, match=r"has no README\.md"):
        push.push(folder, "own/new")
    assert server.seen == []


@pytest.mark.parametrize(
    "damage, error, said",
    [
        (lambda f: f.write_bytes(f.read_bytes()[:1000]), ValueError, "damaged"),
        (lambda f: f.unlink(), FileNotFoundError, "00001-of-00002"),
        (lambda f: (f.parent / "config.json").unlink(), FileNotFoundError, "config"),
        (lambda f: (f.parent / "README.md").write_text(""), ValueError, "an empty one"),
    ],
)
def test_a_damaged_model_stays_here(damage, error, said, server, folder):
    damage(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(error, match=said):
        push.push(folder, "own/new")
    assert not server.seen


def test_a_folder_without_weights_stays_here(server, folder, tmp_path):
    for file in folder.glob("*.safetensors"):
        file.unlink()
    for given in (folder, tmp_path / "absent"):
        said = "00001-of-00002" if given == folder else "config.json"
        with pytest.raises(FileNotFoundError, match=said):
            push.push(given, "own/new")
    assert server.seen == []


@pytest.mark.parametrize(
    ("repo", "status"), [("own/unknown", 401), ("own/refused", 403), (READABLE, 403)]
)
def test_a_refused_token_creates_nothing(repo, status, server, folder):
    said = "correct permissions" if status == 403 else "401 Unauthorized"
    with pytest.raises(errors.HfHubHTTPError, match=said) as caught:
        push.push(folder, repo)
    assert caught.value.response.status_code == status
    assert server.created == {} and contents(server.uploads) == {}


def test_so_does_a_token_that_is_refused_by_xet(server, folder, monkeypatch):
    pytest.importorskip("hf_xet")  # not on every platform
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(ConnectionError, match=r"403 Forbidden.*own/new"):
        push.push(folder, "own/new")


def test_another_error_of_the_hub_is_left_as_it_is(server, folder):
    server.refusals["own/broken"] = (418, "Broken")
    with pytest.raises(errors.HfHubHTTPError) as caught:
        push.push(folder, "own/broken")
    assert caught.value.response.status_code == 418


# ---- the server itself ----


@pytest.mark.parametrize(
    ("uploads", "token", "status"), [(True, False, 401), (False, TOKEN, 403)]
)
def test_the_server_refuses_as_the_hub_does(uploads, token, status, server, folder):
    if not uploads:
        server.uploads = None
    api = HfApi(token=token)
    for write in (
        lambda: api.create_repo("own/new", exist_ok=True),
        lambda: api.upload_folder(repo_id=READABLE, folder_path=folder),
    ):
        with pytest.raises(errors.HfHubHTTPError) as caught:
            write()
        assert caught.value.response.status_code == status
    assert server.created == {}
