"""Write a merged model as one GGUF file for llama.cpp."""

import tempfile
from pathlib import Path

import gguf
import torch
from safetensors import safe_open
from tqdm.auto import tqdm
from transformers import LlamaForCausalLM

from qlora_helpers import model_files
from qlora_helpers.ship.gguf_keys import (
    CONVERTER,
    FACTORS,
    TEMPLATE,
    check_network,
    check_tokens,
    network_keys,
    read_config,
    read_source,
    rope_factors,
    tokenizer_keys,
)

KINDS = {  # GGUF's name for the weights' type, and llama.cpp's number of such a file
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
# Keys that are not copied from the source: they follow from the new file's own weights
# and tokenizer. TEMPLATE is the start of several such keys.
OWN_KEYS = {
    "general.architecture",
    "general.alignment",
    "general.file_type",
    "general.quantization_version",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.add_eos_token",
}


def to_gguf(folder, source, file, kind: str = "F16") -> Path:
    """Write a merged Llama as one GGUF file, whole or not at all.

    folder: of a merged model. source: the base's own GGUF. The vocabulary is copied
    from the source; the network, the end token and the chat template come from the
    folder. kind: the type of the matrices, one of KINDS; norms stay fp32. If a base has
    no GGUF, llama.cpp's `convert_hf_to_gguf.py` makes one.

    Raises ValueError for whatever llama.cpp would not open or would read wrongly,
    FileNotFoundError if the folder's weights or tokenizer or the source do not exist,
    and FileExistsError or PermissionError for a file that must not or cannot be
    written. Source: llama.cpp, gguf-py and conversion of LlamaForCausalLM.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is unknown: take one of {', '.join(KINDS)}")
    folder, source, file = (Path(p).expanduser() for p in (folder, source, file))
    check_place(file, source)
    weights, config = model_files.weight_files(folder), read_config(folder)
    tensors = tensors_of(weights, config, kind)
    reader = read_source(source)
    check_tokens(folder, reader, config)
    check_network(reader, config, {short for short, _ in tensors.values()})
    keys = network_keys(config) | tokenizer_keys(folder, config)
    stretched = config.rope_parameters["rope_type"] != "default"
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    with directory_beside(file) as beside:
        made = Path(beside) / file.name
        writer = gguf.GGUFWriter(made, arch="llama")
        writer.add_bool(OURS, True)  # first, so that check_place finds it
        copy_keys(reader, writer, KINDS[kind])
        for key, value in keys.items():
            writer.add_key_value(key, value, TYPES[type(value)])
        if stretched or any(tensor.name == FACTORS for tensor in reader.tensors):
            add_tensor(writer, FACTORS, rope_factors(config), "F32")
        for name, (short, shard) in tqdm(tensors.items(), desc=file.name, delay=5):
            with safe_open(shard, "pt") as opened:
                weight = opened.get_tensor(name)
            if projection := next((p for p in heads if p in name), None):
                weight = interleave(weight, heads[projection])
            add_tensor(writer, short, weight, kind if weight.ndim == 2 else "F32")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        check_place(file, source)  # again, since minutes may have passed
        made.replace(file)
    return file


OURS = "qlora_helpers.written"  # the key of a file that may be replaced
TYPES = {
    bool: gguf.GGUFValueType.BOOL,
    int: gguf.GGUFValueType.UINT32,
    float: gguf.GGUFValueType.FLOAT32,
    str: gguf.GGUFValueType.STRING,
}


def check_place(file: Path, source: Path) -> None:
    """Raise if the new file would replace one that must stay, or the source is gone."""
    if not source.is_file():
        raise FileNotFoundError(f"{source} is not a file: give the base's own GGUF")
    if file.is_dir():
        raise FileExistsError(f"{file} is a folder: name a file in it")
    if not file.exists():
        return
    if file.samefile(source):
        raise FileExistsError(f"{file} is the source itself: name another file")
    with file.open("rb") as opened:
        start = opened.read(4096)
        if not start.startswith(b"GGUF") or OURS.encode() not in start:
            raise FileExistsError(
                f"{file} exists and this package did not write it, so it would be lost:"
                " name another file"
            )


def directory_beside(file: Path) -> tempfile.TemporaryDirectory:
    """A temporary folder on the disk where the file will be."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=file.parent)
    except OSError as error:
        raise PermissionError(
            f"{file} cannot be written ({error.strerror}): name a file in a folder "
            "that you may write"
        ) from None


def tensors_of(files, config, kind: str) -> dict[str, tuple[str, Path]]:
    """For each tensor of a Llama its name in GGUF and its file, from the headers.

    Raises ValueError, naming the tensor, for one that does not belong to a 16-bit or
    32-bit Llama of this config.
    """
    with torch.device("meta"):
        wanted = LlamaForCausalLM(config).state_dict()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    found = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no dict)
                if name.endswith("rotary_emb.inv_freq"):  # in old Llamas; not a weight
                    continue
                part = opened.get_slice(name)
                shape, dtype = part.get_shape(), part.get_dtype()
                short = names.get_name(name, try_suffixes=(".weight",))
                if dtype not in ("BF16", "F16", "F32"):
                    fault = f"is {dtype}, expected 16 or 32 bits: merge the model first"
                elif short is None or name not in wanted:
                    fault = f"has no place in a Llama's GGUF; {CONVERTER}"
                elif shape != [*wanted[name].shape]:
                    fault = f"is {shape}, but config.json says {[*wanted[name].shape]}"
                    fault += ": merge the model again"
                elif len(shape) == 2 and shape[1] % block:
                    fault = f"has rows of {shape[1]}, not a multiple of {block}: "
                    fault += "take F16"
                else:
                    found[name] = short, file
                    continue
                raise ValueError(f"{name} in {file} {fault}")
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if missing := sorted(wanted.keys() - found.keys() - tied):
        raise ValueError(f"{files[0].parent} lacks {missing[0]}: merge the model again")
    return found


def copy_keys(source: gguf.GGUFReader, writer: gguf.GGUFWriter, kind) -> None:
    """Copy the vocabulary and the general keys; the type is the new file's own."""
    for key, field in source.fields.items():
        if key in OWN_KEYS or key.startswith(TEMPLATE):
            continue
        if key.startswith(("general.", "tokenizer.")):
            sub = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=sub)
    writer.add_file_type(kind)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection in llama.cpp's order: (out, in) as before.

    transformers rotates the first half of a head's rows with its second half, llama.cpp
    each row with its neighbour.
    """
    out, width = weight.shape
    halves = weight.view(heads, 2, out // heads // 2, width)
    return halves.transpose(1, 2).reshape(out, width)


def add_tensor(writer, name: str, weight: torch.Tensor, kind: str) -> None:
    """Quantize one tensor, as llama.cpp does, and add it under its GGUF name.

    Raises ValueError for numbers that the type cannot hold.
    """
    most = torch.finfo(torch.float32 if kind in ("F32", "BF16") else torch.float16).max
    weight = weight.float()
    if not (weight.abs() <= most).all():
        raise ValueError(
            f"{name} holds NaN or a number beyond {most:.5g}, which {kind} cannot "
            "hold: take BF16, or find out where the number comes from"
        )
    wanted = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(
        name, gguf.quants.quantize(weight.numpy(), wanted), raw_dtype=wanted
    )
