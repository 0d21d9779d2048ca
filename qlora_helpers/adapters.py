"""Adapters on disk: saved whole, and loaded onto their own base alone."""

import json
import pathlib
import tempfile

from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

WEIGHTS = "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".pkl")
QUANTIZED = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")  # what the base was


def save_adapter(model, tokenizer, folder, base: dict, dtype=None) -> pathlib.Path:
    """Save the adapter, its tokenizer and what it was trained on, as one folder.

    `base` is `models.base_identity(name)`; peft alone would store a path of this
    machine. `tokenizer` may be None where the base's is meant. `dtype` is what the
    adapter is stored in (left out: as it is). An older folder is replaced as a whole:
    there is never half of one.
    """
    folder = pathlib.Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    config = model.peft_config["default"]
    config.base_model_name_or_path = base["name"]
    config.revision = base["revision"]
    quantization = getattr(model.config, "quantization_config", None)
    facts = dict(base, quantization=quantization and quantization.to_diff_dict())
    state = None
    if dtype is not None:
        state = {n: p.to(dtype) for n, p in model.state_dict().items() if "lora_" in n}
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        made = pathlib.Path(beside) / "adapter"
        # no look-up of the base's vocabulary on the Hub: it was not touched
        model.save_pretrained(made, state_dict=state, save_embedding_layers=False)
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
        (made / "README.md").unlink(missing_ok=True)  # an empty model card
        text = json.dumps(facts, indent=1, default=str)
        (made / "base.json").write_text(text + "\n", encoding="utf-8")
        if folder.exists():
            folder.replace(pathlib.Path(beside) / "old")
        made.replace(folder)
    return folder


def load_adapter(model, folder, base: dict, name: str = "default") -> PeftModel:
    """The model with the adapter of a folder that `save_adapter` wrote.

    `base` is `models.base_identity` of the model's base. A model that has adapters
    already gets this one beside them, as `name`; it is not switched on.

    Raises FileNotFoundError or ValueError, in a sentence, for a folder that is none, is
    damaged or holds a pickle, and for an adapter of another base: peft would load it
    without a word, and it would answer nonsense.
    """
    saved = check_adapter(folder, base)
    check_quantization(model, folder)
    if isinstance(model, PeftModel):
        model.load_adapter(folder, name)
    else:
        model = PeftModel.from_pretrained(model, folder, adapter_name=name)
    wanted = get_peft_model_state_dict(
        model, adapter_name=name, save_embedding_layers=False
    )
    if set(wanted) != saved:
        raise ValueError(
            f"{pathlib.Path(folder) / WEIGHTS} holds {len(saved & set(wanted))} of the "
            f"{len(wanted)} tensors that adapter_config.json asks for: it was saved or "
            "copied in part; save it again"
        )
    return model


def base_of(folder) -> dict:
    """What an adapter was trained on: name, revision, weights_sha256, quantization.

    Raises FileNotFoundError where there is no adapter, ValueError where it is no JSON.
    """
    facts = pathlib.Path(folder) / "base.json"
    if not facts.exists():
        raise FileNotFoundError(f"{folder} holds no adapter: base.json is not there")
    try:
        return json.loads(facts.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{facts} is damaged ({error}): copy it again") from None


def check_adapter(folder, base: dict) -> set[str]:
    """The names of an adapter's tensors, once all is there and the base is its own.

    Raises what `load_adapter` raises; nothing but safetensors is ever opened.
    """
    folder = pathlib.Path(folder)
    trained_on = base_of(folder)
    if not (folder / "adapter_config.json").exists():
        raise FileNotFoundError(f"{folder} lacks adapter_config.json: copy it again")
    weights = folder / WEIGHTS
    if not weights.exists():
        pickles = [file.name for file in folder.iterdir() if file.suffix in PICKLES]
        if pickles:
            raise ValueError(
                f"{folder / pickles[0]} is a pickle, and loading one can run any code: "
                f"it is not opened; ask its author for {WEIGHTS}"
            )
        raise FileNotFoundError(f"{folder} lacks {WEIGHTS}: copy it again")
    try:
        with safe_open(weights, "pt") as opened:
            names = set(opened.keys())
    except SafetensorError as error:
        raise ValueError(
            f"{weights} is damaged or cut short ({error}): copy it again"
        ) from None
    for key in ("name", "revision", "weights_sha256"):
        if trained_on.get(key) != base.get(key):
            raise ValueError(
                f"the adapter in {folder} was trained on another base: {key} is "
                f"{trained_on.get(key)!r} there and {base.get(key)!r} here: load that "
                "base"
            )
    return names


def check_quantization(model, folder) -> None:
    """Raise ValueError for a 4-bit model of another kind than the adapter's base.

    A model that is not quantized passes: into one adapters are merged.
    """
    quantization = getattr(model.config, "quantization_config", None)
    trained_in = base_of(folder).get("quantization")
    if quantization is None or not trained_in:
        return
    for key in QUANTIZED:
        here = getattr(quantization, key, None)
        if trained_in.get(key) != here:
            raise ValueError(
                f"the adapter in {folder} was trained with {key}="
                f"{trained_in.get(key)!r}, and this model has {here!r}: load the base "
                "with train.nf4_config(env.profile())"
            )
