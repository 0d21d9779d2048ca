"""Load a base model and its tokenizer, ready for training and for questions."""

import os
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import sdpa_attention

from qlora_helpers import env
from qlora_helpers.model_files import (
    VOCABULARIES,
    open_weights,
    read_json,
    weight_files,
)
from qlora_helpers.models.sources import (
    EMBEDDED,
    _is_adapter,
    hub_errors_explained,
    only_cached,
    source_of,
)


def load_base(name=EMBEDDED, quantization=None, dtype=None, revision=None):
    """A base model, in eval mode on the profile's device, and its tokenizer.

    name: "embedded", a local directory, or a Hub id. quantization: a BitsAndBytesConfig
    or None. dtype: of what is not quantized; by default the compute dtype of the 4-bit
    config, else the profile's. revision: a commit, tag or branch of the Hub id; by
    default the newest commit. Returns (model, tokenizer with a pad token).

    Raises PermissionError (gated), FileNotFoundError (no such model) or ConnectionError
    (no network), each saying what to do, and ValueError for an adapter.
    """
    machine = env.profile()
    if dtype is None:
        four_bit = quantization is not None and quantization.load_in_4bit
        dtype = (
            quantization.bnb_4bit_compute_dtype if four_bit else machine.compute_dtype
        )
    source = source_of(name, revision)
    # passed on as None it would hide that a checkpoint is quantized already
    given = {} if quantization is None else {"quantization_config": quantization}
    if revision is not None:
        given["revision"] = revision
    with hub_errors_explained(name):
        offline = only_cached(source, revision)
        if os.path.isdir(source):
            _check_folder(Path(source))
        tokenizer = AutoTokenizer.from_pretrained(
            source,
            trust_remote_code=False,
            local_files_only=offline,
            revision=revision or "main",
        )
        model, loading = AutoModelForCausalLM.from_pretrained(
            source,
            output_loading_info=True,
            dtype=dtype,
            device_map={"": str(machine.device)},  # else bitsandbytes prefers a GPU
            attn_implementation="sdpa",
            use_safetensors=True,  # never a pickle
            trust_remote_code=False,
            local_files_only=offline,
            **given,
        )
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers added an adapter
        raise ValueError(_is_adapter(name, "?"))
    if missing := sorted(loading["missing_keys"]):  # transformers made them up
        raise ValueError(
            f"{name} lacks {missing[0]}, which its config.json asks for: its files are "
            "not complete, or belong to another model; copy them again"
        )
    if tokenizer.pad_token is None:
        # Llama 3.x keeps a token for this; elsewhere the end token, which the attention
        # mask hides where it pads.
        kept = "<|finetune_right_pad_id|>"
        has_one = kept in tokenizer.get_vocab()
        tokenizer.pad_token = kept if has_one else tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    never_repack(model)
    choose_attention(machine)
    pack_last_token(model)
    return model, tokenizer


def never_repack(model) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at the first eval-mode forward.

    On CPUs with AVX512-BF16 it does so in place, for speed, and from then on gradients,
    merges, dequantize() and saving read the new layout as if it were the old one.
    Source: bitsandbytes/nn/modules.py, Linear4bit.forward.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def choose_attention(machine) -> None:
    """Let a GPU without flash attention (the fp16 profile) repeat keys and values.

    A T4 has no flash kernel. If heads share keys and values, torch then uses its math
    kernel, which keeps every score: an 8B with one row of 4,096 tokens takes 14.9 GiB
    instead of 7.6 (data/measured/attention.json). The choice holds for the whole
    process. Source: transformers/integrations/sdpa_attention.py, use_gqa_in_sdpa.
    """
    keep = (lambda *_, **__: False) if machine.fp16 else SHARED_KEYS
    sdpa_attention.use_gqa_in_sdpa = keep


SHARED_KEYS = sdpa_attention.use_gqa_in_sdpa  # transformers' own choice


def repeats_keys_and_values() -> bool:
    """True if attention repeats keys and values that heads share, mask or not."""
    key = torch.empty(1, 1, 1, 64)
    return not sdpa_attention.use_gqa_in_sdpa(None, key, key)


def pack_last_token(model) -> None:
    """Give the output head contiguous rows, not a slice of every token's.

    generate() asks for the last token's logits alone. Of such a slice torch's matmul
    makes a batched product, for which oneDNN copies the frozen head once a row: 2.6 GiB
    and seconds for 50 questions in bf16. Seen with torch 2.11 on a Xeon.
    """

    def contiguous(head, inputs):
        return (inputs[0].contiguous(), *inputs[1:])

    model.get_output_embeddings().register_forward_pre_hook(contiguous)


def _check_folder(folder: Path) -> None:
    """Raise FileNotFoundError or ValueError for a folder that holds no whole model."""
    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"{folder} holds no config.json: expected the folder of a model"
        )
    read_json(folder / "config.json", "model_type")
    for file in weight_files(folder):
        open_weights(file)
    if not any((folder / name).exists() for name in VOCABULARIES):
        raise FileNotFoundError(
            f"{folder} holds no tokenizer ({', '.join(VOCABULARIES)}): save the "
            "tokenizer of the model there too"
        )


def nested(model) -> str:
    """Why a model that got adapters twice is refused; "" for any other model."""
    if sum(isinstance(module, PeftModel) for module in model.modules()) < 2:
        return ""
    return (
        "the model is a PeftModel within a PeftModel, because get_peft_model was "
        "called twice: load the base again, and call get_peft_model once"
    )
