"""Read an adapter and its base for a merge, and refuse what is more than B A."""

import copy
import dataclasses
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from transformers import AutoConfig, BitsAndBytesConfig

from qlora_helpers import adapters, model_files, models
from qlora_helpers.model_files import open_weights

PREFIX = "base_model.model."  # what peft writes before a module's name
# COUNTED: settings of a LoraConfig that a merge uses. ELSEWHERE: those that only say
# where adapters sit or how they were trained. An adapter with any other setting is more
# than B A added to linear weights, or comes from a PEFT that is newer than this code.
COUNTED = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
ELSEWHERE = (
    "auto_mapping base_model_name_or_path eva_config exclude_modules inference_mode"
    " layers_pattern layers_to_transform lora_dropout megatron_core peft_type"
    " peft_version qalora_group_size revision runtime_config target_modules task_type"
).split()
# Initializations of A and B that keep the base; others first subtract B A from it.
STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")


def tensors_of(folder: Path) -> dict[str, tuple[Path, int]]:
    """Each tensor's file and bytes, in the files' order, read from their headers."""
    found = {}
    for file in model_files.weight_files(folder):
        with open_weights(file) as opened:
            for name in opened.keys():  # noqa: SIM118 (no dict)
                part = opened.get_slice(name)
                width = WIDTH.get(part.get_dtype())
                if width is None:
                    raise ValueError(
                        f"{file.name}: {name} is {part.get_dtype()}: expected a base "
                        "in bf16, fp16 or fp32, not a quantized one"
                    )
                size = width * torch.Size(part.get_shape()).numel()
                found[name] = (file, size)
    return found


WIDTH = {"BF16": 2, "F16": 2, "F32": 4}  # bytes; safetensors' names


def read_pairs(adapter) -> dict[str, tuple]:
    """For each weight that an adapter changes: A, B and alpha / r.

    Raises ValueError, naming the setting or the tensor, for an adapter that does more
    than add (alpha / r) B A to weights of the unchanged base.
    """
    adapter = Path(adapter).expanduser()
    config = _plain_lora(adapter)
    tensors = load_file(Path(adapter) / adapters.WEIGHTS)
    pairs = {}
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        A = tensors.pop(name)
        B = tensors.pop(name.replace(".lora_A.", ".lora_B."), None)
        module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        if B is None or A.ndim != 2 or B.ndim != 2:
            raise ValueError(
                f"the adapter in {adapter} has no matrices A and B for {module}, and "
                "merge_folder merges only linear layers: " + IN_MEMORY
            )
        rank = config.rank_pattern.get(
            get_pattern_key(config.rank_pattern, module), config.r
        )
        alpha = config.alpha_pattern.get(
            get_pattern_key(config.alpha_pattern, module), config.lora_alpha
        )
        if (A.shape[0], B.shape[1]) != (rank, rank):
            raise ValueError(
                f"the adapter in {adapter} has rank {A.shape[0]} for {module}, but its "
                f"{adapters.CONFIG} says {rank}: save the adapter again"
            )
        scaling = alpha / (rank**0.5 if config.use_rslora else rank)
        pairs[f"{module}.weight"] = (A, B, scaling)
    if tensors:
        raise ValueError(
            f"the adapter in {adapter} holds {sorted(tensors)[0]}, so it is more than "
            "B A: " + IN_MEMORY
        )
    return pairs


IN_MEMORY = "merge it in memory, with PEFT's merge_and_unload(), and check the result"


def _plain_lora(adapter) -> LoraConfig:
    """Check that every setting of an adapter can be merged, and return its config."""
    given = model_files.read_json(Path(adapter) / adapters.CONFIG, "peft_type")
    if given.get("peft_type") != "LORA":
        raise ValueError(
            f"the adapter in {adapter} is of type {given.get('peft_type')}, not LORA: "
            + IN_MEMORY
        )
    usual = {
        field.name: field.default_factory()
        if field.default is dataclasses.MISSING
        else field.default
        for field in dataclasses.fields(LoraConfig)
    }
    start = given.pop("init_lora_weights", True)
    if (start.lower() if isinstance(start, str) else start) not in STARTS:
        raise ValueError(
            f"the adapter in {adapter} was initialized with init_lora_weights={start!r}"
            ", which changed its base, so it does not fit the unchanged base: save the "
            "adapter again with PEFT's path_initial_model_for_weight_conversion"
        )
    for key, value in given.items():
        if key in COUNTED or key in ELSEWHERE or value == usual.get(key):
            continue
        if value or usual.get(key):
            known = key in usual
            more = "is more than B A" if known else "the installed PEFT does not have"
            raise ValueError(
                f"the adapter in {adapter} has {key}={value!r}, which {more}: "
                + IN_MEMORY
            )
    return PeftConfig.from_pretrained(adapter)


def _check_whole(adapter, source, files) -> None:
    """Raise ValueError if the adapter or the base lacks tensors that its config has."""
    config = copy.copy(_plain_lora(adapter))
    config.init_lora_weights = False
    of_base = AutoConfig.from_pretrained(source)
    model, _ = models.skeleton(of_base, None, torch.float32)
    names = set(model.state_dict())
    lacking = names - set(files) - ({"lm_head.weight"} if _tied(of_base) else set())
    if set(files) <= names and lacking:  # else the files name their tensors otherwise
        raise ValueError(
            f"{source} lacks {sorted(lacking)[0]}, which its config.json asks for: "
            "copy the base again"
        )
    model = get_peft_model(model, config, low_cpu_mem_usage=True)
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    adapters.check_whole(adapter, adapters.tensor_names(Path(adapter)), set(wanted))


def _tied(config) -> bool:
    return getattr(config, "tie_word_embeddings", False)


def _check_fit(pairs, files, source, adapter) -> None:
    """Raise ValueError if the adapter does not fit the files of the base."""
    for name, (A, B, _) in pairs.items():
        if name not in files:
            config = AutoConfig.from_pretrained(source)
            way = "give the base that it was trained on"
            if name.startswith("lm_head") and _tied(config):
                way = "it is tied to the embedding, so train without lm_head"
            raise ValueError(f"the base lacks {name}, which the adapter changes: {way}")
        with open_weights(files[name][0]) as opened:
            shape = opened.get_slice(name).get_shape()
        if shape != [B.shape[0], A.shape[1]]:
            raise ValueError(
                f"{name} is {shape} in the base, but the adapter changes a weight of "
                f"{[B.shape[0], A.shape[1]]}: give the base that it was trained on"
            )
    rows, needed = model_files.embedding_rows(source), adapters.token_rows(adapter)
    if rows is not None and needed > rows:
        raise ValueError(
            f"the adapter's tokenizer has {needed:,} tokens, but the base has rows for "
            f"{rows:,}: neither holds the rows of the added tokens; train without "
            "added tokens"
        )


def four_bit_weights(source: Path, adapter) -> dict[str, torch.dtype]:
    """The weights that were 4-bit while the adapter trained, and their compute dtype.

    Raises ValueError for an adapter that was not trained on NF4 with double
    quantization.
    """
    given = adapters.base_of(adapter).get("quantization")
    quantization = BitsAndBytesConfig(**(given or {}))
    nf4 = quantization.load_in_4bit and quantization.bnb_4bit_quant_type == "nf4"
    if not (nf4 and quantization.bnb_4bit_use_double_quant):
        raise ValueError(
            f"the adapter in {adapter} was trained on a base quantized as {given}: "
            'into "dequantized" goes what was trained on NF4 with double quantization; '
            'take into="original"'
        )
    dtype = quantization.bnb_4bit_compute_dtype
    model, _ = models.skeleton(AutoConfig.from_pretrained(source), quantization, dtype)
    layers = model.named_modules()
    return {f"{n}.weight": dtype for n, m in layers if isinstance(m, Linear4bit)}
