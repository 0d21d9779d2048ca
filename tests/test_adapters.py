"""Adapters on disk: whole or not there, and refused on every base but their own."""

import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BitsAndBytesConfig

from qlora_helpers import adapters, card, env, models, records, score, train
from qlora_helpers.adapters import save_load
from qlora_helpers.models import embedded

BASE = {"name": "tiny", "revision": "a" * 40, "tensors_sha256": "0" * 64, "rows": 49152}
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])


def base_model(config=None):
    return models.random_llama("tiny", config or train.nf4_config(env.profile()))


def adapted(seed):
    """A tiny 4-bit model with an adapter that changes it."""
    torch.manual_seed(seed)
    model = get_peft_model(base_model(), train.lora_config(r=4, alpha=8)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def logits(model, **options):
    with torch.no_grad():
        return model(input_ids=IDS.to(model.device), **options).logits


@pytest.fixture(scope="module")
def model():
    return adapted(0)


@pytest.fixture
def saved(model, tmp_path):
    return adapters.save_adapter(model, None, tmp_path / "adapter", BASE)


def test_a_saved_adapter_answers_the_same_on_a_fresh_base(model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(embedded.embedded_dir())
    saved = adapters.save_adapter(model, tokenizer, tmp_path / "adapter", BASE)
    names = {file.name for file in saved.iterdir()}
    assert {"adapter_model.safetensors", "base.json", "tokenizer.json"} <= names
    assert not any(name.endswith(adapters.PICKLES) for name in names)
    modes = {file.stat().st_mode for file in saved.iterdir() if file.is_file()}
    assert len(modes) == 1  # who can read the card can read the weights
    config = json.loads((saved / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == "tiny"
    assert config["revision"] == BASE["revision"]
    loaded = adapters.load_adapter(base_model(), saved, BASE).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_interrupted_save_leaves_the_old_adapter(model, saved, monkeypatch):
    before = (saved / adapters.WEIGHTS).read_bytes()

    def stopped(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(save_load.card, "write_adapter_card", stopped)
    with pytest.raises(KeyboardInterrupt):
        adapters.save_adapter(model, None, saved, BASE)
    assert (saved / adapters.WEIGHTS).read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["adapter"]


# ---- refused, with a sentence


def test_another_base_is_refused(saved):
    other = BASE | {"tensors_sha256": "1" * 64}
    said = "another base: tensors_sha256 is .* load 'tiny', revision aaaa"
    with pytest.raises(ValueError, match=said):
        adapters.check_adapter(saved, other)  # before any model is loaded
    with pytest.raises(ValueError, match=said):
        adapters.load_adapter(base_model(), saved, other)


@pytest.mark.parametrize("key", ["name", "revision"])
def test_equal_weights_are_the_same_base_whatever_they_are_called(saved, key):
    adapters.load_adapter(base_model(), saved, BASE | {key: "other"})


def test_another_quantization_is_refused_before_a_model_is_loaded(saved):
    adapters.check_adapter(saved, BASE, train.nf4_config(env.profile()))
    other = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    with pytest.raises(ValueError, match="bnb_4bit_use_double_quant is True"):
        adapters.check_adapter(saved, BASE, other)


def cut(folder):
    whole = (folder / adapters.WEIGHTS).read_bytes()
    (folder / adapters.WEIGHTS).write_bytes(whole[: len(whole) // 2])


def keep_half(folder):
    tensors = load_file(folder / adapters.WEIGHTS)
    half = dict(list(tensors.items())[: len(tensors) // 2])
    save_file(half, folder / adapters.WEIGHTS)


def without(name):
    return lambda folder: (folder / name).unlink()


def spoil_note(folder):
    (folder / "base.json").write_text('{"name": ', "utf-8")


@pytest.mark.parametrize(
    "fault, error, said",
    [
        (cut, ValueError, "damaged or cut short"),
        (keep_half, ValueError, "holds 14 of the 28 tensors"),
        (without(adapters.WEIGHTS), FileNotFoundError, "lacks adapter_model"),
        (without("adapter_config.json"), FileNotFoundError, "it is not an adapter"),
        (without("base.json"), ValueError, "was not saved by save_adapter"),
        (spoil_note, ValueError, "base.json is damaged"),
    ],
)
def test_a_damaged_folder_is_refused(saved, fault, error, said):
    fault(saved)
    with pytest.raises(error, match=said):
        adapters.load_adapter(base_model(), saved, BASE)


class Harm:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_refused_and_never_opened(saved, tmp_path):
    (saved / adapters.WEIGHTS).unlink()
    harm = pickle.dumps(Harm(tmp_path / "harm"))
    (saved / "adapter_model.bin").write_bytes(harm)
    with pytest.raises(ValueError, match="is a pickle, and loading one can run any"):
        adapters.load_adapter(base_model(), saved, BASE)
    assert not (tmp_path / "harm").exists()
    pickle.loads(harm)  # the control: opened, it does its harm
    assert (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "config, key",
    [
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type"),
        ({"bnb_4bit_use_double_quant": False}, "bnb_4bit_use_double_quant"),
    ],
)
def test_another_quantization_is_refused(saved, config, key):
    given = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True} | config
    other = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=env.profile().compute_dtype,
        **given,
    )
    with pytest.raises(ValueError, match=key):
        adapters.load_adapter(base_model(other), saved, BASE)


def test_a_16_bit_base_takes_the_adapter(saved):
    plain = models.random_llama("tiny")
    before = logits(plain)
    loaded = adapters.load_adapter(plain, saved, BASE).eval()
    assert not torch.equal(logits(loaded), before)


# ---- many adapters on one base


@pytest.fixture
def two(saved, tmp_path):
    """A model with two adapters, `default` on."""
    other = adapters.save_adapter(adapted(1), None, tmp_path / "other", BASE)
    model = adapters.load_adapter(base_model(), saved, BASE)
    return adapters.load_adapter(model, other, BASE, "other").eval()


def test_a_swap_leaves_no_trace(two):
    first = logits(two)
    two.set_adapter("other")
    second = logits(two)
    assert not torch.equal(first, second)
    two.set_adapter("default")
    assert torch.equal(logits(two), first)
    two.delete_adapter("other")
    assert torch.equal(logits(two), first)


def test_switched_off_it_is_the_base(two):
    base = logits(base_model())
    with two.disable_adapter():
        assert torch.equal(logits(two), base)
    assert not torch.equal(logits(two), base)


def test_two_adapters_in_one_batch_answer_as_each_alone(two):
    names = ["default", "other", "__base__"]
    mixed = logits(two, adapter_names=names)
    alone = [logits(two)[0]]
    two.set_adapter("other")
    alone.append(logits(two)[1])
    with two.disable_adapter():
        alone.append(logits(two)[2])
    for row, own in zip(mixed, alone, strict=True):
        assert torch.equal(row, own)
    with pytest.raises(ValueError, match="adapter_names"):
        logits(two.train(), adapter_names=names)


@pytest.mark.parametrize("name", ["adapter", "adapter_delay"])
def test_the_committed_adapters_belong_to_the_embedded_base(name, tmp_path):
    identity = models.base_identity(models.EMBEDDED)
    folder = shutil.copytree(env.path(f"data/{name}"), tmp_path / name)
    assert len(adapters.check_adapter(folder, identity)) == 2 * 7 * 30
    quantization = adapters.base_of(folder)["quantization"]
    assert quantization["bnb_4bit_quant_type"] == "nf4"
    assert quantization["bnb_4bit_use_double_quant"] is True


# ---- a folder is replaced only where all in it was written here


@pytest.fixture
def project(tmp_path):
    """A folder with a person's work in it."""
    folder = tmp_path / "project"
    (folder / "checkpoint-500").mkdir(parents=True)
    (folder / "notes.txt").write_text("weeks of work", "utf-8")
    return folder


def contents(folder):
    """Every file below a folder with its bytes."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file): file.read_bytes() for file in files}


def test_a_folder_with_other_files_is_never_replaced(model, project):
    before = contents(project)
    with pytest.raises(FileExistsError, match="holds checkpoint-500 and 1 more, which"):
        adapters.save_adapter(model, None, project, BASE)
    assert contents(project) == before and (project / "checkpoint-500").is_dir()


@pytest.mark.parametrize("name", ["mine.txt", ".hidden", "adapter_config.json"])
def test_a_file_that_was_added_or_changed_is_never_lost(model, saved, name):
    (saved / name).write_text("mine", "utf-8")
    before = contents(saved)
    with pytest.raises(FileExistsError, match=f"{name}, which its base.json does"):
        adapters.save_adapter(model, None, saved, BASE)
    assert contents(saved) == before


def test_another_model_s_folder_is_not_taken_for_an_adapter_s(model, tmp_path):
    base_model().save_pretrained(tmp_path / "model")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="which would be lost"):
        adapters.save_adapter(model, None, tmp_path / "model", BASE)
    assert contents(tmp_path) == before


def test_a_file_is_never_replaced_by_a_folder(model, tmp_path):
    (tmp_path / "diary").write_text("mine", "utf-8")
    with pytest.raises(FileExistsError, match="diary is a file: name a folder"):
        adapters.save_adapter(model, None, tmp_path / "diary", BASE)
    with pytest.raises(PermissionError, match="cannot be written .*: name a folder"):
        adapters.save_adapter(model, None, tmp_path / "diary" / "adapter", BASE)
    assert (tmp_path / "diary").read_text("utf-8") == "mine"


def test_the_current_folder_is_never_replaced(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileExistsError, match="the current folder"):
        adapters.save_adapter(model, None, ".", BASE)


def test_saved_again_an_adapter_replaces_its_own_folder(saved, tmp_path):
    adapters.save_adapter(adapted(1), None, saved, BASE)
    loaded = adapters.load_adapter(base_model(), saved, BASE).eval()
    assert torch.equal(logits(loaded), logits(adapted(1)))
    empty = tmp_path / "empty"
    empty.mkdir()
    adapters.save_adapter(adapted(1), None, empty, BASE)


def test_a_card_that_a_person_wrote_outlives_the_adapter(model, saved):
    assert card.is_own_card(saved / "README.md")
    (saved / "README.md").write_text("# Mine", "utf-8")
    adapters.save_adapter(model, None, saved, BASE)
    assert (saved / "README.md").read_text("utf-8") == "# Mine"


@pytest.fixture
def interrupted(monkeypatch):
    """Path.replace that calls a function in place of the second of the two renames."""
    replace = pathlib.Path.replace

    def when_made(instead):
        def renamed(path, target):
            return instead(target) if path.name == "made" else replace(path, target)

        monkeypatch.setattr(pathlib.Path, "replace", renamed)

    return when_made


KILLED = """import os, pathlib, signal, sys
from qlora_helpers import folders
def stop(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "between the renames":
    replace = pathlib.Path.replace
    pathlib.Path.replace = lambda path, to: (
        stop() if path.name == "made" else replace(path, to))
with folders.written_whole(sys.argv[1], sys.argv[3], {}, {}) as made:
    (made / "half").write_text("x")
    if sys.argv[2] == "filling":
        stop()
"""


@pytest.mark.parametrize("when", ["filling", "between the renames"])
def test_the_next_save_removes_what_a_killed_process_left(model, saved, when):
    before = contents(saved)
    command = [sys.executable, "-c", KILLED, saved, when, "base.json"]
    subprocess.run(command, cwd=env.ROOT, check=False)
    [left] = saved.parent.glob(f".{saved.name}.*")
    assert (left / "made" / "half").exists()
    adapters.save_adapter(model, None, saved, BASE)
    assert not left.exists() and contents(saved).keys() == before.keys()


def test_what_a_running_process_fills_is_left_to_it(model, saved):
    beside = saved.with_name(f".{saved.name}.{os.getpid()}.abc")
    (beside / "made").mkdir(parents=True)
    adapters.save_adapter(model, None, saved, BASE)
    assert beside.exists()


def test_an_interrupt_between_the_two_renames_loses_nothing(model, saved, interrupted):
    (saved / "README.md").write_text("# Mine", "utf-8")
    before = contents(saved)

    def stop(target):
        raise KeyboardInterrupt

    interrupted(stop)
    with pytest.raises(KeyboardInterrupt):
        adapters.save_adapter(model, None, saved, BASE)
    assert contents(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["adapter"]


def test_another_process_in_that_moment_loses_nothing(model, saved, interrupted):
    before = sorted(contents(saved).values())

    def another(target):
        target.mkdir()
        (target / "theirs").write_text("x", "utf-8")
        raise OSError("Directory not empty")

    interrupted(another)
    with pytest.raises(
        FileExistsError, match="another process wrote to .* is in "
    ) as e:
        adapters.save_adapter(model, None, saved, BASE)
    old = pathlib.Path(str(e.value).split(" is in ")[1].split(",")[0])
    assert sorted(contents(old).values()) == before
    assert (saved / "theirs").exists()


def test_a_file_that_comes_in_that_moment_is_kept(model, saved, monkeypatch):
    replace = pathlib.Path.replace

    def late(path, target):
        if path == saved:
            (path / "mine.txt").write_text("mine", "utf-8")
        return replace(path, target)

    monkeypatch.setattr(pathlib.Path, "replace", late)
    with pytest.raises(FileExistsError, match="mine.txt was just written"):
        adapters.save_adapter(model, None, saved, BASE)
    assert (saved / "mine.txt").read_text("utf-8") == "mine"
    assert (saved / adapters.WEIGHTS).exists()


def test_what_tools_put_beside_it_is_kept(model, saved):
    (saved / ".DS_Store").write_bytes(b"x")
    (saved / ".gitattributes").write_text("*.safetensors filter=lfs", "utf-8")
    (saved / ".ipynb_checkpoints").mkdir()
    (saved / ".ipynb_checkpoints" / "README-checkpoint.md").write_text("a", "utf-8")
    adapters.save_adapter(model, None, saved, BASE)
    assert (saved / ".ipynb_checkpoints" / "README-checkpoint.md").exists()
    assert (saved / ".gitattributes").read_text("utf-8").startswith("*.safe")


def test_weights_that_were_trained_on_in_place_are_never_lost(model, saved):
    tensors = {n: t + 1 for n, t in load_file(saved / adapters.WEIGHTS).items()}
    save_file(tensors, saved / adapters.WEIGHTS, metadata={"format": "pt"})  # same size
    with pytest.raises(FileExistsError, match="holds adapter_model.safetensors"):
        adapters.save_adapter(model, None, saved, BASE)


def test_a_tokenizer_with_two_templates_is_saved_and_replaced(model, saved):
    tokenizer = AutoTokenizer.from_pretrained(embedded.embedded_dir())
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "x"}
    for _ in range(2):
        adapters.save_adapter(model, tokenizer, saved, BASE)
    again = AutoTokenizer.from_pretrained(saved)
    assert set(again.chat_template) == {"default", "tool_use"}
    (saved / "additional_chat_templates" / "mine.txt").write_text("mine", "utf-8")
    with pytest.raises(FileExistsError, match="holds additional_chat_templates/mine"):
        adapters.save_adapter(model, tokenizer, saved, BASE)


@pytest.mark.parametrize("name", ["adapter_config.json", "base.json"])
@pytest.mark.parametrize("text", ["{oops", "", "{}", "[]", "null"])
def test_damaged_json_is_named(saved, name, text):
    (saved / name).write_text(text, "utf-8")
    for ask in (adapters.check_adapter, lambda f, b: adapters.load_adapter(None, f, b)):
        with pytest.raises((ValueError, AttributeError), match=""):
            ask(saved, BASE)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        adapters.check_adapter(saved, BASE)


def test_a_damaged_tokenizer_is_named(model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(embedded.embedded_dir())
    folder = adapters.save_adapter(model, tokenizer, tmp_path / "adapter", BASE)
    (folder / "tokenizer.json").write_text("{", "utf-8")
    with pytest.raises(ValueError, match="the tokenizer in .* cannot be opened"):
        adapters.load_adapter(base_model(), folder, BASE)


@pytest.mark.parametrize(
    "given",
    [
        {"load_in_4bit": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"load_in_8bit": True},
    ],
    ids=str,
)
def test_an_adapter_loads_onto_the_base_it_was_trained_on(saved, given):
    """Whatever the quantization: transformers leaves its defaults out of the note."""
    config = BitsAndBytesConfig(**given)
    note = json.loads((saved / "base.json").read_text("utf-8"))
    note["quantization"] = config.to_diff_dict()
    (saved / "base.json").write_text(json.dumps(note, default=str), "utf-8")
    adapters.check_adapter(saved, BASE, config)
    with pytest.raises(ValueError, match="trained on another base: .* quantized as "):
        adapters.check_adapter(saved, BASE, train.nf4_config(env.profile()))


def test_what_no_identity_is_gets_a_sentence(model, saved, tmp_path):
    for ask in (
        lambda: adapters.save_adapter(model, None, tmp_path / "x", "some/base"),
        lambda: adapters.load_adapter(model, saved, None),
        lambda: adapters.check_adapter(saved, str(tmp_path)),
    ):
        with pytest.raises(TypeError, match="expected models.base_identity"):
            ask()


# ---- adapters of others, and adapters that go on


def test_an_adapter_of_peft_is_refused_until_it_is_saved_again(model, tmp_path):
    folder = tmp_path / "unsloth"
    model.save_pretrained(folder)
    with pytest.raises(
        ValueError, match=r"not saved by save_adapter.* PeftModel\.from"
    ):
        adapters.load_adapter(base_model(), folder, BASE)
    before = contents(folder)
    with pytest.raises(FileExistsError, match="which its base.json"):
        adapters.save_adapter(model, None, folder, BASE)
    assert contents(folder) == before
    theirs = PeftModel.from_pretrained(base_model(), folder)
    again = adapters.save_adapter(theirs, None, tmp_path / "again", BASE)
    loaded = adapters.load_adapter(base_model(), again, BASE).eval()
    assert torch.equal(logits(loaded), logits(model))


def test_a_note_without_a_hash_of_the_base_proves_nothing(saved):
    old = {"name": "tiny", "revision": None, "weights_sha256": "0" * 64}
    (saved / "base.json").write_text(json.dumps(old | {"quantization": None}), "utf-8")
    with pytest.raises(ValueError, match="no base.json with a hash of its base"):
        adapters.check_adapter(saved, BASE)


def test_rows_that_peft_saved_beside_the_adapter_are_named(model, saved):
    model.save_pretrained(saved, save_embedding_layers=True)
    said = "28 of the 28 .*(embed_tokens|lm_head).* without others"
    with pytest.raises(ValueError, match=said):
        adapters.load_adapter(base_model(), saved, BASE)


def test_a_saved_adapter_is_trained_further(saved, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(embedded.embedded_dir())
    rows = records.load("train")[:8]
    dataset = records.to_prompt_completion(rows, tokenizer, system=None)
    settings = train.sft_config(env.profile(), str(tmp_path / "run"), 1, 2, 1e-2)

    def trainer(**given):
        model = adapters.load_adapter(base_model(), saved, BASE, **given)
        return train.build_trainer(model, tokenizer, dataset, settings)

    with pytest.raises(RuntimeError, match="nothing can train, .*trainable=True"):
        train.check_effective(trainer(), env.profile())
    goes_on = trainer(trainable=True)
    train.check_effective(goes_on, env.profile())
    goes_on.train()
    again = adapters.save_adapter(goes_on.model, tokenizer, saved, BASE)
    loaded = adapters.load_adapter(base_model(), again, BASE).eval()
    # accelerate leaves the trainer's model in it
    with score.generate._as_trained(loaded):
        again = logits(loaded).float()
    assert torch.equal(again, logits(goes_on.model.eval()).float())


def test_an_adapter_with_a_name_of_its_own_is_saved_as_one_folder(two, tmp_path):
    two.set_adapter("other")
    folder = adapters.save_adapter(two, None, tmp_path / "one", BASE)
    assert all(file.is_file() for file in folder.iterdir())
    loaded = adapters.load_adapter(base_model(), folder, BASE).eval()
    assert torch.equal(logits(loaded), logits(two))


@pytest.mark.parametrize("name", ["a.b", ""])
def test_a_name_that_torch_cannot_take_changes_nothing(two, saved, name):
    before = logits(two)
    with pytest.raises(KeyError, match="module name can"):
        adapters.load_adapter(two, saved, BASE, name)
    assert torch.equal(logits(two), before)
    assert set(two.peft_config) == {"default", "other"}


def test_a_name_is_given_once(two, saved):
    with pytest.raises(ValueError, match="already has an adapter .*'other'"):
        adapters.load_adapter(two, saved, BASE, "other")


def test_what_holds_no_adapter_or_two_at_once_is_not_saved(two, tmp_path):
    with pytest.raises(ValueError, match="LlamaForCausalLM without an adapter"):
        adapters.save_adapter(base_model(), None, tmp_path / "x", BASE)
    two.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="one folder holds one adapter"):
        adapters.save_adapter(two, None, tmp_path / "x", BASE)
    assert not (tmp_path / "x").exists()


# ---- tokens that were added


def grown(saved_rows, tied=True):
    """A tiny base with a row more than it had, its adapter, and its tokenizer."""
    config = models.llama_config("tiny")
    config.tie_word_embeddings = tied
    model = models.random_llama(config, train.nf4_config(env.profile()))
    tokenizer = AutoTokenizer.from_pretrained(embedded.embedded_dir())
    tokenizer.add_tokens(["<sql>"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    lora = LoraConfig(
        r=4, target_modules=train.PROJECTIONS, task_type="CAUSAL_LM",
        modules_to_save=saved_rows,
    )  # fmt: skip
    return get_peft_model(model, lora).eval(), tokenizer


@pytest.mark.parametrize("saved_rows", [None, ["embed_tokens"], ["lm_head"]])
def test_rows_of_added_tokens_that_would_be_lost_are_refused(saved_rows, tmp_path):
    model, tokenizer = grown(saved_rows)
    said = "rows for 49,152 tokens, but 49,153 are needed.* would be lost"
    with pytest.raises(ValueError, match=said):
        adapters.save_adapter(model, tokenizer, tmp_path / "adapter", BASE)
    with pytest.raises(ValueError, match=said):  # the rows have grown all the same
        adapters.save_adapter(model, None, tmp_path / "adapter", BASE)
    assert list(tmp_path.iterdir()) == []


def test_rows_that_are_saved_come_back(tmp_path):
    model, tokenizer = grown(["embed_tokens", "lm_head"], tied=False)
    folder = adapters.save_adapter(model, tokenizer, tmp_path / "adapter", BASE)
    config = models.llama_config("tiny")
    config.tie_word_embeddings = False
    fresh = models.random_llama(config, train.nf4_config(env.profile()))
    loaded = adapters.load_adapter(fresh, folder, BASE).eval()
    ids = torch.tensor([[5, 49152, 7]])
    with torch.no_grad():
        same = torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert same and isinstance(loaded, PeftModel)


def test_a_tokenizer_that_has_outgrown_the_base_is_refused_on_loading(model, tmp_path):
    """As PEFT, TRL or an older version of this package left it."""
    folder = adapters.save_adapter(model, None, tmp_path / "adapter", BASE)
    grown(None)[1].save_pretrained(folder)
    with pytest.raises(ValueError, match="49,153 are needed"):
        adapters.load_adapter(base_model(), folder, BASE)


def test_half_precision_keeps_all_that_the_adapter_holds(tmp_path):
    model, tokenizer = grown(["embed_tokens", "lm_head"], tied=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.half()
    folder = adapters.save_adapter(model, tokenizer, tmp_path / "adapter", BASE)
    stored = load_file(folder / adapters.WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert len(stored) == 2 * 14 + 2


def test_a_link_is_somebody_s_and_stays(model, saved, tmp_path):
    (tmp_path / "big").mkdir()
    for name, target in {"checkpoints": tmp_path / "big", "dead": "/nowhere"}.items():
        (saved / name).symlink_to(target)
        with pytest.raises(FileExistsError, match=f"holds {name}"):
            adapters.save_adapter(model, None, saved, BASE)
        (saved / name).unlink()
    adapters.save_adapter(model, None, saved, BASE)


def test_a_foreign_file_is_named_without_being_read(model, saved, monkeypatch):
    (saved / "aa_huge.bin").write_bytes(b"x")

    def read(file):
        raise AssertionError("read")

    monkeypatch.setattr(save_load.folders, "sha256", read)
    monkeypatch.setattr(save_load.folders, "_seen", {})
    (saved / "base.json").write_text("{}", "utf-8")
    with pytest.raises(FileExistsError, match="holds aa_huge.bin"):
        adapters.check_place(saved)


def test_a_bad_second_adapter_does_not_stay_in_the_way(two, saved):
    two.delete_adapter("other")
    weights = load_file(saved / adapters.WEIGHTS)
    keep_half(saved)
    with pytest.raises(ValueError, match="holds 14 of the 28"):
        adapters.load_adapter(two, saved, BASE, "other")
    save_file(weights, saved / adapters.WEIGHTS, metadata={"format": "pt"})
    assert "other" in adapters.load_adapter(two, saved, BASE, "other").peft_config


def test_another_rank_than_the_config_says_gets_a_sentence(saved):
    config = json.loads((saved / "adapter_config.json").read_text("utf-8"))
    (saved / "adapter_config.json").write_text(json.dumps(config | {"r": 8}), "utf-8")
    with pytest.raises(RuntimeError, match="size mismatch for .*lora_"):
        adapters.load_adapter(base_model(), saved, BASE)


# ---- what one folder cannot hold, and what a refusal must not leave behind


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_that_are_not_finite_are_not_saved(value, tmp_path):
    model = adapted(0)
    weights = next(p for n, p in model.named_parameters() if "lora_B" in n)
    weights.data[0, 0] = value
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        adapters.save_adapter(model, None, tmp_path / "adapter", BASE)
    assert not (tmp_path / "adapter").exists()


def test_a_model_that_got_adapters_twice_is_not_saved(tmp_path):
    twice = get_peft_model(adapted(0), train.lora_config(r=4, alpha=8))
    with pytest.raises(ValueError, match="a PeftModel within a PeftModel"):
        adapters.save_adapter(twice, None, tmp_path / "adapter", BASE)


def test_a_refused_adapter_leaves_the_base_as_it_was(model, saved, tmp_path):
    bad = pathlib.Path(shutil.copytree(saved, tmp_path / "bad"))
    tensors = load_file(bad / adapters.WEIGHTS)
    last = sorted(tensors)[-1]
    tensors[last] = tensors[last][:, :2].contiguous()
    save_file(tensors, bad / adapters.WEIGHTS, metadata={"format": "pt"})
    base = base_model()
    before = logits(base)
    with pytest.raises(RuntimeError, match="size mismatch for .*lora_"):
        adapters.load_adapter(base, bad, BASE)
    assert torch.equal(logits(base), before)
    loaded = adapters.load_adapter(base, saved, BASE).eval()
    assert torch.equal(logits(loaded), logits(model))


def test_a_base_that_carries_an_adapter_already_is_refused(model, saved):
    base = base_model()
    loaded = adapters.load_adapter(base, saved, BASE).eval()
    with pytest.raises(ValueError, match="already has an adapter"):
        adapters.load_adapter(base, saved, BASE)
    assert torch.equal(logits(loaded), logits(model))  # the first one still works
