"""Write a merged model as one GGUF file for llama.cpp."""

import re
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from qlora_helpers import models
from qlora_helpers.model_files import has_tokenizer, open_weights
from qlora_helpers.ship.mergeable import check_tensors, tensors_of

KINDS = ("F16", "BF16", "Q8_0")
# The values in config.json, and in its rope_parameters, that llama.cpp's Llama follows.
CAN_BE = {
    "quantization_config": (None,),
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "rope_type": ("default", "llama3"),
    "partial_rotary_factor": (1.0,),
}
CONVERTER = "llama.cpp's convert_hf_to_gguf.py may take it"
OURS = "qlora_helpers.written"  # the key of a file that may be replaced
OWN_KEYS = re.compile(  # keys that are the folder's, and not copied from the source
    r"general\.(architecture|alignment|file_type|quantization_version)|"
    r"tokenizer\.ggml\.(eos_token_id|bos_token_id|add_bos_token|add_eos_token)|"
    r"tokenizer\.chat_template.*"
)
FACTORS = "rope_freqs.weight"  # the tensor that stretches Llama 3's rotary embedding


def to_gguf(folder, source, file, kind: str = "F16") -> Path:
    """Write a merged Llama as one GGUF file, whole or not at all.

    folder: of a merged model. source: the base's own GGUF, whose vocabulary is copied;
    if there is none, llama.cpp's `convert_hf_to_gguf.py` makes one. kind: the type of
    the matrices, one of KINDS; norms stay fp32.

    Raises ValueError for whatever llama.cpp would not open or would read wrongly,
    FileNotFoundError for a missing file, and FileExistsError for a `file` that must not
    be replaced. Source: llama.cpp, gguf-py and conversion of LlamaForCausalLM.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is unknown: take one of {', '.join(KINDS)}")
    folder, source, file = (Path(p).expanduser() for p in (folder, source, file))
    check_place(file, source)
    config, tensors = read_model(folder, kind)
    if not has_tokenizer(folder):
        raise FileNotFoundError(f"{folder} holds no tokenizer: copy the base's into it")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    shorts = {short for _, short in tensors.values()}
    reader = read_source(source, config, tokenizer, shorts)
    stretched = config.rope_parameters["rope_type"] != "default"
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as beside:
        made = Path(beside) / file.name
        writer = gguf.GGUFWriter(made, arch="llama")
        writer.add_bool(OURS, True)  # first, so that check_place finds it
        for key, field in reader.fields.items():
            copied = key.startswith(("general.", "tokenizer."))
            if copied and not OWN_KEYS.fullmatch(key):
                outer, inner = field.types[0], field.types[-1]  # a list's, its items'
                writer.add_key_value(key, field.contents(), outer, sub_type=inner)
        for key, value in network_keys(config).items():
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(key, value)
        add_tokenizer(writer, tokenizer, folder, config)
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        if stretched or any(tensor.name == FACTORS for tensor in reader.tensors):
            add_tensor(writer, FACTORS, rope_factors(config), "F32")
        for name, (shard, short) in tqdm(tensors.items(), desc=file.name, delay=5):
            with open_weights(shard) as opened:
                weight = opened.get_tensor(name)
            if "q_proj" in name:
                weight = interleave(weight, config.num_attention_heads)
            elif "k_proj" in name:
                weight = interleave(weight, config.num_key_value_heads)
            add_tensor(writer, short, weight, kind if weight.ndim == 2 else "F32")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        check_place(file, source)  # again, since minutes may have passed
        made.replace(file)
    return file


def check_place(file: Path, source: Path) -> None:
    """Raise if the new file would replace one that must stay, or the source is gone."""
    if not source.is_file():
        raise FileNotFoundError(f"{source} is not a file: give the base's own GGUF")
    if not file.exists():
        return
    with file.open("rb") as opened:
        start = opened.read(4096)
    if file.samefile(source):
        raise FileExistsError(f"{file} is the source itself: name another file")
    if not start.startswith(b"GGUF") or OURS.encode() not in start:
        raise FileExistsError(f"{file} was not written by this package: name another")


def read_model(folder: Path, kind: str):
    """The folder's config, and each tensor's file and name in GGUF.

    Raises ValueError if llama.cpp's Llama cannot follow the config or hold a tensor.
    """
    tensors, found = tensors_of(folder), {}
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    given = config.to_dict()
    given |= given.get("rope_parameters") or {}
    for name, allowed in CAN_BE.items():
        value = given.get(name, allowed[0])
        if value not in allowed:
            expected = " or ".join(map(str, allowed))
            raise ValueError(
                f"{folder} has {name} {value!r}, expected {expected}; {CONVERTER}"
            )
    model, _ = models.skeleton(config, None, torch.float32)
    known = set(model.state_dict())
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    for name, (file, tensor) in tensors.items():
        if name.endswith("rotary_emb.inv_freq"):  # in old Llamas; not a weight
            continue
        short = table.get_name(name, try_suffixes=(".weight",))
        if short is None or name not in known:
            raise ValueError(f"{name} in {file} has no place in a GGUF; {CONVERTER}")
        if tensor.ndim == 2 and tensor.shape[1] % block:
            raise ValueError(f"{name}: {block} does not divide its width: take F16")
        found[name] = file, short
    check_tensors(folder, tensors, model)
    return config, found


def network_keys(config) -> dict:
    """What a GGUF says about a Llama's network, from its config; floats as fp32."""
    keys = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(np.float32(config.rms_norm_eps)),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(np.float32(config.rope_parameters["rope_theta"])),
    }
    return {f"llama.{key}": value for key, value in keys.items()}


def read_source(source, config, tokenizer, shorts: set[str]) -> gguf.GGUFReader:
    """The base's own GGUF. Raises ValueError if the folder's model is another one."""
    try:
        reader = gguf.GGUFReader(source)
        tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    except Exception as error:  # GGUFReader raises many kinds, none of its own
        raise ValueError(
            f"{source} cannot be read as GGUF ({error!r}): give the base's own"
        ) from None
    differ, factors = [], rope_factors(config).numpy()

    def compare(what, theirs, ours):
        if theirs != ours:
            differ.append(
                f"{what} is {theirs!r} in the source and {ours!r} in the folder"
            )

    here = network_keys(config) | {"general.architecture": "llama"}
    for key, field in reader.fields.items():
        if key in here or key.startswith("llama."):
            compare(key, field.contents(), here.get(key))
    compare("the number of tokens", len(tokens), config.vocab_size)
    there = dict(enumerate(tokens))
    for token, number in tokenizer.get_vocab().items():
        compare(f"token {number}", there.get(number), token)
    for tensor in reader.tensors:
        if tensor.name == FACTORS:
            same_shape = tensor.data.shape == factors.shape
            if not same_shape or not np.allclose(tensor.data, factors):
                differ.append(f"{FACTORS} in the source is not config.json's RoPE")
        elif tensor.name not in shorts | {"output.weight"}:  # it may hold a tied head
            differ.append(f"the source has {tensor.name} but the folder does not")
    if differ:
        raise ValueError(
            f"the source is another model's ({'; '.join(differ[:4])}): give the base's "
            f"own GGUF; if there are new tokens, {CONVERTER}"
        )
    return reader


def add_tokenizer(writer, tokenizer, folder: Path, config) -> None:
    """Add end token, start token and chat template. ValueError if ends differ."""
    end, start = tokenizer.eos_token_id, tokenizer.bos_token_id
    ends = config.eos_token_id
    if (folder / "generation_config.json").exists():
        ends = GenerationConfig.from_pretrained(folder).eos_token_id
    if end is None or end not in (ends if isinstance(ends, list) else [ends]):
        raise ValueError(
            f"the tokenizer of {folder} ends at token {end} but its config at {ends}, "
            "and llama.cpp follows the tokenizer: make the two agree"
        )
    writer.add_eos_token_id(end)
    starts = start is not None and tokenizer("?").input_ids[:1] == [start]
    if start is not None:
        writer.add_bos_token_id(start)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.get_chat_template())
        # llama.cpp would put BOS before a chat too, which transformers never does
        chat = [{"role": "user", "content": "?"}]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        starts = starts and text.startswith(tokenizer.bos_token)
    writer.add_add_bos_token(starts)


def rope_factors(config) -> torch.Tensor:
    """llama.cpp's divisor of each rotary frequency: shape (head_dim / 2,), fp32."""
    plain, _ = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return plain / LlamaRotaryEmbedding(config).inv_freq


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection in llama.cpp's order: (out, in) as before."""
    # transformers rotates row n of a head with row n + half, llama.cpp neighbours
    out, width = weight.shape
    halves = weight.view(heads, 2, out // heads // 2, width)
    return halves.transpose(1, 2).reshape(out, width)


def add_tensor(writer, name: str, weight: torch.Tensor, kind: str) -> None:
    """Quantize and add a tensor. ValueError for a number that the type cannot hold."""
    most = torch.finfo(torch.float32 if kind in ("F32", "BF16") else torch.float16).max
    weight = weight.float()
    if not (weight.abs() <= most).all():
        raise ValueError(
            f"{name} holds NaN or a number beyond {most:.5g}, which {kind} "
            "cannot hold: take BF16"
        )
    dtype = gguf.GGMLQuantizationType[kind]
    packed = gguf.quants.quantize(weight.numpy(), dtype)
    writer.add_tensor(name, packed, raw_dtype=dtype)
