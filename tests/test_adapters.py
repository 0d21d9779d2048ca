"""Adapters on disk: whole or not there, and refused on every base but their own."""

import json
import os
import pickle
import shutil

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BitsAndBytesConfig

from qlora_helpers import adapters, embedded, env, models, train

BASE = {"name": "tiny", "revision": "a" * 40, "weights_sha256": "0" * 64}
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
    config = json.loads((saved / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == "tiny"
    assert config["revision"] == BASE["revision"]
    loaded = adapters.load_adapter(base_model(), saved, BASE).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert list(tmp_path.glob("tmp*")) == []


def test_an_interrupted_save_leaves_the_old_adapter(model, saved, monkeypatch):
    before = (saved / adapters.WEIGHTS).read_bytes()

    def stopped(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(adapters.json, "dumps", stopped)
    with pytest.raises(KeyboardInterrupt):
        adapters.save_adapter(model, None, saved, BASE)
    assert (saved / adapters.WEIGHTS).read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["adapter"]


# ---- refused, with a sentence


@pytest.mark.parametrize("key", ["name", "revision", "weights_sha256"])
def test_another_base_is_refused(saved, key):
    with pytest.raises(ValueError, match=f"another base: {key} is .* load that base"):
        adapters.load_adapter(base_model(), saved, BASE | {key: "other"})


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
        (without("adapter_config.json"), FileNotFoundError, "lacks adapter_config"),
        (without("base.json"), FileNotFoundError, "no adapter"),
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
