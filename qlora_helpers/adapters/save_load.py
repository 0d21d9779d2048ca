"""Adapters on disk: saved whole, and loaded only onto their own base."""

import copy
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file

from qlora_helpers import card, folders
from qlora_helpers.adapters import checks
from qlora_helpers.models.load import nested


def save_adapter(model, tokenizer, folder, base: dict) -> Path:
    """Save the active adapter with its tokenizer, its card and a note on its base.

    `base`: `models.base_identity(name)`; PEFT would store a path of this machine.
    `tokenizer`: None if it is the base's. An older adapter there is replaced as a
    whole. Raises FileExistsError or PermissionError for a folder that holds anything
    else, and ValueError if several adapters are active, rows of added tokens would be
    lost or a number is not finite.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"the model is a {type(model).__name__} without an adapter: give what "
            "get_peft_model or load_adapter returned"
        )
    if said := nested(model):
        raise ValueError(said)
    if len(model.active_adapters) != 1:
        raise ValueError(
            f"the adapters {model.active_adapters} are active, but one folder holds "
            "one adapter: choose it with model.set_adapter(name)"
        )
    [name] = model.active_adapters
    checks.check_identity(base)
    quantization = getattr(model.config, "quantization_config", None)
    note = dict(base, quantization=quantization and quantization.to_diff_dict())
    with folders.written_whole(folder, checks.NOTE, note, {}) as made:
        tensors = _tensors(model, name)
        for key, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise ValueError(
                    f"{key} holds NaN or infinity, because the training diverged: "
                    "train again with half the learning_rate"
                )
            tensors[key] = tensor.contiguous().clone()  # or they could share memory
        save_file(tensors, made / checks.WEIGHTS, metadata={"format": "pt"})
        config = copy.copy(model.peft_config[name])
        config.base_model_name_or_path = base["name"]
        config.revision = base["revision"]
        config.inference_mode = True  # as PEFT saves it
        config.save_pretrained(made)
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
        rows = model.get_input_embeddings().weight.shape[0]
        checks.check_rows(made, base.get("rows") or rows, rows)
        card.write_adapter_card(made, base)
    return Path(folder).expanduser()


def check_place(folder) -> None:
    """Raise what `save_adapter` would raise if it may not write to `folder`."""
    folders.check_out(folder, checks.NOTE, {})


def load_adapter(
    model, folder, base: dict, name: str = "default", trainable: bool = False
) -> PeftModel:
    """Return the model with the adapter of a folder that `save_adapter` wrote.

    `base`: `models.base_identity` of the model's base. A model with adapters gets this
    one as `name`, not active. `trainable`: True to train it further.

    Raises FileNotFoundError or ValueError for a folder that holds no whole adapter, a
    pickle, or an adapter of another base, which PEFT would load without a warning, and
    PEFT's RuntimeError for a tensor whose shape the config contradicts.
    """
    folder = checks.as_folder(folder)
    quantization = getattr(model.config, "quantization_config", None)
    saved = checks.check_adapter(folder, base, quantization)
    has_adapters = isinstance(model, PeftModel)
    if has_adapters:  # PEFT would keep the older adapter's alpha
        taken = name in model.peft_config
    else:
        taken = any(isinstance(module, BaseTunerLayer) for module in model.modules())
    if taken:
        raise ValueError(
            f"the model already has an adapter in the place of {name!r}: give its "
            "PeftModel and another name, or load the base again"
        )
    have = model.get_input_embeddings().weight.shape[0]
    rows = checks.saved_rows(folder)
    if rows in (0, have) or has_adapters:
        checks.check_rows(folder, have, have)
    else:  # the adapter brings the rows of added tokens
        model.resize_token_embeddings(rows, mean_resizing=False)
    try:
        if has_adapters:
            loaded = model
            model.load_adapter(folder, name, is_trainable=trainable)
        else:
            loaded = PeftModel.from_pretrained(model, folder, name, trainable)
        checks.check_whole(folder, saved, set(_tensors(loaded, name)))
    except BaseException:  # what was added would be in the way of the right one
        if not has_adapters:
            _strip(model)
        elif name in model.peft_config:
            model.delete_adapter(name)
        raise
    return loaded


def _tensors(model, name: str) -> dict:
    """An adapter's tensors, by the names that PEFT gives them in a file."""
    # "auto" would look up the base's vocabulary on the Hub; `check_rows` is better
    return get_peft_model_state_dict(
        model, adapter_name=name, save_embedding_layers=False
    )


def _strip(base) -> None:
    """Take away what PEFT put into a base before it raised an error."""
    for path, module in list(base.named_modules()):
        if isinstance(module, BaseTunerLayer):
            base.set_submodule(path, module.get_base_layer())
        elif isinstance(module, AuxiliaryTrainingWrapper):
            base.set_submodule(path, module.original_module)
    vars(base).pop("peft_config", None)
