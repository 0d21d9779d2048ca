"""Read an adapter and its base for a merge, and refuse what is more than B A."""

from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoConfig, BitsAndBytesConfig
from transformers.modeling_utils import load_state_dict

from qlora_helpers import adapters, model_files, models

PREFIX = "base_model.model."  # what peft writes before a module's name
# The settings of a LoraConfig that a merge counts, then those that only say where
# adapters sit or how they were trained. An adapter with any other setting is more than
# B A added to linear weights, or comes from a PEFT that is newer than this code.
SETTINGS = (
    "r lora_alpha use_rslora rank_pattern alpha_pattern"
    " auto_mapping base_model_name_or_path eva_config exclude_modules inference_mode"
    " layers_pattern layers_to_transform lora_dropout megatron_core"
    " peft_version qalora_group_size revision runtime_config target_modules task_type"
).split()
# Initializations of A and B that keep the base; others first subtract B A from it.
STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
IN_MEMORY = "merge it in memory, with PEFT's merge_and_unload(), and check the result"


def tensors_of(folder) -> dict[str, tuple[Path, torch.Tensor]]:
    """Each tensor's file, and the tensor on torch's meta device, without its numbers.

    Raises ValueError for a model that is not in 16 or 32 bits.
    """
    found = {}
    for file in model_files.weight_files(folder):
        for name, tensor in load_state_dict(file, map_location="meta").items():
            if tensor.dtype not in DTYPES:
                raise ValueError(
                    f"{name} in {file} is {tensor.dtype}, expected 16 or 32 bits: give "
                    "a model that is not quantized"
                )
            found[name] = file, tensor
    return found


def check_tensors(folder, files: dict, model) -> None:
    """Raise ValueError unless files hold what the model of config.json needs."""
    for name, tensor in model.state_dict().items():
        if name in files:
            found = [*files[name][1].shape]
        elif name in model.all_tied_weights_keys:
            continue
        else:
            found = "missing"
        if found != [*tensor.shape]:
            raise ValueError(
                f"{name} is {found} in {folder}, but {[*tensor.shape]} by config.json: "
                "copy or merge the model again"
            )


def read_pairs(adapter, source) -> dict[str, tuple]:
    """For each weight of the base that an adapter changes: A, B and alpha / r.

    source: the folder of the base. Raises ValueError, with the setting or the tensor,
    for an adapter that does more than add (alpha / r) B A to the unchanged base, and
    for an adapter or a base that is incomplete or does not fit the other.
    """
    adapter = Path(adapter).expanduser()
    config = _plain_lora(adapter)
    model, _ = models.skeleton(AutoConfig.from_pretrained(source), None, torch.float32)
    files = tensors_of(source)
    if set(files) <= set(model.state_dict()):  # else the files name them otherwise
        check_tensors(source, files, model)
    model = get_peft_model(model, config, low_cpu_mem_usage=True)
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    saved = adapters.tensor_names(adapter)
    tensors, pairs = load_file(adapter / adapters.WEIGHTS), {}
    for name in sorted(saved & set(wanted)):
        if tensors[name].shape != wanted[name].shape:
            raise ValueError(
                f"{name} in {adapter} is not {[*wanted[name].shape]}, as base and "
                "config ask: give the base that it was trained on"
            )
    adapters.check_whole(adapter, saved, set(wanted))
    for module, layer in model.named_modules():
        linear = f"{module}.lora_A.weight"
        if linear in tensors and tensors[linear].ndim == 2:
            A, B = tensors.pop(linear), tensors.pop(f"{module}.lora_B.weight")
            scaling = layer.scaling["default"]
            pairs[f"{module.removeprefix(PREFIX)}.weight"] = A, B, scaling
    if tensors:
        raise ValueError(
            f"{adapter} holds {min(tensors)}, so it is more than B A: {IN_MEMORY}"
        )
    if absent := pairs.keys() - files.keys():
        raise ValueError(
            f"the adapter changes {min(absent)}, which the base does not hold (perhaps "
            "it is tied to the embedding): train without it"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if (needed := adapters.token_rows(adapter)) > rows:
        raise ValueError(
            f"the adapter's tokenizer has {needed:,} tokens, but the base has rows for "
            f"{rows:,}: train without added tokens"
        )
    return pairs


def _plain_lora(adapter) -> LoraConfig:
    """The config of an adapter. Raises ValueError for a setting that is not merged."""
    given = model_files.read_json(adapter / adapters.CONFIG, "peft_type")
    start = given.pop("init_lora_weights", True)
    lowered = start.lower() if isinstance(start, str) else start
    if lowered not in STARTS:
        raise ValueError(
            f"{adapter} was initialized with init_lora_weights={start!r}, which changed"
            " its base: save it with PEFT's path_initial_model_for_weight_conversion"
        )
    usual = LoraConfig().to_dict()
    for key in ("peft_type", *given):  # another kind of adapter is named first
        value, default = given[key], usual.get(key)
        both_off = not value and not default  # None, False or empty
        if key not in SETTINGS and value != default and not both_off:
            raise ValueError(
                f"{adapter} has {key}={value!r}, which is more than B A or newer than "
                f"the installed PEFT: {IN_MEMORY}"
            )
    config = PeftConfig.from_pretrained(adapter)
    config.init_lora_weights = False
    config.base_model_name_or_path = None  # else PEFT warns that its name differs
    return config


def four_bit_weights(source, adapter) -> dict[str, torch.dtype]:
    """The weights that were 4-bit while the adapter trained, and their compute dtype.

    Raises ValueError unless it was trained on NF4 with double quantization.
    """
    given = adapters.base_of(adapter).get("quantization")
    quantization = BitsAndBytesConfig(**(given or {}))
    nf4 = quantization.load_in_4bit and quantization.bnb_4bit_quant_type == "nf4"
    if not (nf4 and quantization.bnb_4bit_use_double_quant):
        raise ValueError(
            f"{adapter} was trained on a base quantized as {given}, not in NF4 with "
            'double quantization: take into="original"'
        )
    dtype = quantization.bnb_4bit_compute_dtype
    model, _ = models.skeleton(AutoConfig.from_pretrained(source), quantization, dtype)
    return {
        f"{name}.weight": dtype
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit)
    }
