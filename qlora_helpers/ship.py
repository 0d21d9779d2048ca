"""Ship a merged model: its card, and a GGUF file for llama.cpp."""

import os
import pathlib
import tempfile

import gguf
import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors import safe_open
from tqdm.auto import tqdm
from transformers import AutoConfig

from . import adapters, env
from .evaluate import Accuracy

CARD = """---
{header}
---

# {title}

{base} with a QLoRA adapter merged into its {into} weights, stored in 16 bits.

- **Base**: {base}, revision `{revision}`
- **Data**: {data}
- **Measured**: {accuracy}; {asked}, execution accuracy, 95 % interval
- **Made with**: {versions}
- **Licence**: {licence}

Ask it as it was trained, with its chat template and this system message:

```
{system}
```

It answers for the tables of one database. Load it with plain transformers; neither
bitsandbytes nor peft is needed.
"""
KINDS = {  # GGUF's name for the weights' type, and llama.cpp's number of such a file
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "Q5_1": gguf.LlamaFileType.MOSTLY_Q5_1,
    "Q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
    "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}


def write_card(folder, adapter, facts: dict, accuracy: Accuracy) -> pathlib.Path:
    """Write README.md, the model's card, into the folder of a merged model.

    adapter: the folder it came from, whose base it names. facts, in words: `into` (the
    weights it was merged into), `data`, `licence` (its SPDX name), `system` (the system
    message) and `asked` (the questions of `accuracy`, which was measured on the merged
    model itself). Raises KeyError for a fact that is missing.
    """
    folder = pathlib.Path(folder)
    base = adapters.base_of(adapter)
    header = ModelCardData(
        license=facts["licence"].lower(),
        library_name="transformers",
        tags=["qlora"],
        pipeline_tag="text-generation",
    ).to_yaml()
    text = CARD.format(
        header=header,
        title=folder.name,
        base=base["name"],
        revision=base["revision"],
        accuracy=repr(accuracy),
        versions=", ".join(f"{k} {v}" for k, v in env.versions().items()),
        **facts,
    )
    card = folder / "README.md"
    beside = folder / f"README.md.{os.getpid()}.part"
    ModelCard(text).save(beside)
    beside.replace(card)
    return card


def to_gguf(folder, source, file, kind: str = "F16") -> pathlib.Path:
    """Write a merged Llama as one GGUF file, whole or not at all.

    folder: of a merged model. source: the base's own GGUF, from which all that is no
    weight is copied (tokenizer, template, hyperparameters). kind: the type of the
    matrices, one of KINDS; norms stay fp32. For a base that has no GGUF, llama.cpp's
    `convert_hf_to_gguf.py` makes one.

    Raises ValueError for an unknown kind, FileNotFoundError for a folder without
    weights. Source: llama.cpp, gguf-py and conversion of LlamaForCausalLM.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is unknown: take one of {', '.join(KINDS)}")
    folder, file = pathlib.Path(folder), pathlib.Path(file)
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise FileNotFoundError(f"{folder} holds no *.safetensors: not a merged model")
    config = AutoConfig.from_pretrained(folder)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as beside:
        made = pathlib.Path(beside) / file.name
        writer = gguf.GGUFWriter(made, arch="llama")
        copy_keys(gguf.GGUFReader(source), writer, KINDS[kind])
        for shard in shards:
            with safe_open(shard, "pt") as opened:
                for name in tqdm(opened.keys(), desc=file.name, delay=5):
                    weight = opened.get_tensor(name)
                    if projection := next((p for p in heads if p in name), None):
                        weight = interleave(weight, heads[projection])
                    short = names.get_name(name, try_suffixes=(".weight",))
                    wanted = kind if weight.ndim == 2 else "F32"
                    add_tensor(writer, short, weight, gguf.GGMLQuantizationType[wanted])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        made.replace(file)
    return file


def copy_keys(source: gguf.GGUFReader, writer: gguf.GGUFWriter, kind) -> None:
    """Copy all that is no weight; the type of the weights is the new file's own."""
    for key, field in source.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", FILE_TYPE):
            continue
        sub = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(key, field.contents(), field.types[0], sub_type=sub)
    writer.add_uint32(FILE_TYPE, kind)


FILE_TYPE = "general.file_type"


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection in llama.cpp's order: (out, in) as before.

    transformers rotates the first half of a head's rows with its second half, llama.cpp
    each row with its neighbour.
    """
    out, width = weight.shape
    halves = weight.view(heads, 2, out // heads // 2, width)
    return halves.transpose(1, 2).reshape(out, width)


def add_tensor(writer, name, weight, kind) -> None:
    """Quantize one tensor, as llama.cpp does, and add it under its GGUF name."""
    data = gguf.quants.quantize(weight.float().numpy(), kind)
    writer.add_tensor(name, data, raw_dtype=kind)
