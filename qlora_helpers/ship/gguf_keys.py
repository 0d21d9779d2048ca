"""What a GGUF file says of a network and its tokenizer, and whether a source fits."""

import math
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

CONVERTER = "llama.cpp's convert_hf_to_gguf.py may take it"
FACTORS = "rope_freqs.weight"  # the tensor that stretches Llama 3's rotary embedding
TEMPLATE = "tokenizer.chat_template"


def read_config(folder: Path):
    """The folder's config. Raises ValueError if llama.cpp's Llama cannot follow it."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json: give a merged model")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"{folder} is still quantized (quantization_config in config.json): merge "
            "the model into 16 bits first, with merge.merge_folder"
        )
    if config.model_type != "llama":
        raise ValueError(f"{folder} is a {config.model_type}, not a llama; {CONVERTER}")
    rope = config.rope_parameters
    for name, value, known in (
        ("hidden_act", config.hidden_act, ("silu",)),
        ("rope_type", rope["rope_type"], ("default", "llama3")),
        ("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), (1.0,)),
    ):
        if value not in known:
            expected = " or ".join(map(str, known))
            raise ValueError(
                f"{folder} has {name} {value!r}, expected {expected}; {CONVERTER}"
            )
    return config


def read_source(source: Path) -> gguf.GGUFReader:
    """Open the base's own GGUF. Raises ValueError if it is not a Llama's GGUF."""
    try:
        reader = gguf.GGUFReader(source)
    except Exception as error:  # GGUFReader raises many kinds, none of its own
        raise ValueError(
            f"{source} cannot be read as GGUF ({error}): give the base's own GGUF"
        ) from None
    for key in ("general.architecture", "tokenizer.ggml.tokens"):
        if key not in reader.fields:
            raise ValueError(f"{source} has no {key}: give the base's own GGUF")
    architecture = reader.fields["general.architecture"].contents()
    if architecture != "llama":
        raise ValueError(
            f"{source} is the GGUF of a {architecture}: give one of a llama"
        )
    return reader


def network_keys(config) -> dict:
    """What a GGUF says about a Llama's network, from its config."""
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
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    return {f"llama.{key}": value for key, value in keys.items()}


def check_network(reader, config, shorts: set[str]) -> None:
    """Raise ValueError if the source's network is not the folder's.

    shorts: the folder's tensors, by their GGUF names.
    """
    here, differ = network_keys(config), []
    for key, field in reader.fields.items():
        if not key.startswith("llama."):
            continue
        there, mine = field.contents(), here.get(key)
        same = there == mine
        if isinstance(mine, float) and isinstance(there, float):
            same = math.isclose(there, mine, rel_tol=1e-6)  # GGUF stores fp32
        if not same:
            said = "unknown" if mine is None else mine
            differ.append(f"{key} is {there} in the source and {said} in the folder")
    for tensor in reader.tensors:
        if tensor.name == FACTORS:
            mine = rope_factors(config).numpy()
            if tensor.data.shape != mine.shape or not np.allclose(tensor.data, mine):
                differ.append(f"{FACTORS} in the source is not config.json's RoPE")
        elif tensor.name not in shorts | {"output.weight"}:  # it may hold a tied head
            differ.append(f"the source has {tensor.name} but the folder does not")
    if differ:
        more = f" (and {len(differ) - 4} more)" if differ[4:] else ""
        raise ValueError(
            f"the source is not the GGUF of this model's base: {'; '.join(differ[:4])}"
            f"{more}: give the base's own GGUF"
        )


def rope_factors(config) -> torch.Tensor:
    """llama.cpp's divisor of each rotary frequency: shape (head_dim / 2,), fp32.

    Source: llama.cpp, conversion of Llama 3: rope_freqs.weight.
    """
    plain, _ = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return plain / LlamaRotaryEmbedding(config).inv_freq


def check_tokens(folder: Path, reader, config) -> None:
    """Raise ValueError if rows, the source's tokens and the tokenizer differ.

    Raises FileNotFoundError for a folder without a tokenizer.
    """
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    if len(tokens) != config.vocab_size:
        raise ValueError(
            f"{folder} has {config.vocab_size} rows of embeddings, but the source has "
            f"{len(tokens)} tokens: give the base's own GGUF; if rows were added or "
            f"padded, {CONVERTER}"
        )
    if not any(folder.glob("tokenizer*")):
        raise FileNotFoundError(
            f"{folder} holds no tokenizer: save the base's tokenizer in it"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    for token, number in tokenizer.get_vocab().items():
        there = tokens[number] if number < len(tokens) else None
        if there != token:
            raise ValueError(
                f"token {number} is {token!r} in {folder} but {there!r} in the source: "
                f"give the base's own GGUF; if tokens were added, {CONVERTER}"
            )


def tokenizer_keys(folder: Path, config) -> dict:
    """What the folder's tokenizer says: end and start token, chat template.

    Raises ValueError if transformers and llama.cpp would stop at different tokens.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    end, start = tokenizer.eos_token_id, tokenizer.bos_token_id
    ends = config.eos_token_id
    if (folder / "generation_config.json").exists():
        ends = GenerationConfig.from_pretrained(folder).eos_token_id
    if end is None or end not in (ends if isinstance(ends, list) else [ends]):
        raise ValueError(
            f"the tokenizer of {folder} ends at token {end} but its "
            f"generation_config.json at {ends}, so llama.cpp would stop elsewhere than "
            "transformers: make the two agree"
        )
    keys = {"tokenizer.ggml.eos_token_id": end}
    adds = start is not None and tokenizer("?").input_ids[:1] == [start]
    if start is not None:
        keys["tokenizer.ggml.bos_token_id"] = start
    if tokenizer.chat_template is not None:
        keys[TEMPLATE] = tokenizer.get_chat_template()
        # llama.cpp would put BOS before a chat too, which transformers never does
        chat = [{"role": "user", "content": "?"}]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        adds = adds and text.startswith(tokenizer.bos_token)
    return keys | {"tokenizer.ggml.add_bos_token": adds}
