"""Merge an adapter into its base, shard by shard: neither model is ever held whole.

    python -m qlora_helpers.merge BASE ADAPTER OUT --into dequantized --shard-mb 1000

Notebook 07 writes out `lora_change` and `through_nf4`, and says which base to take.
"""

import argparse
import copy
import dataclasses
import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from huggingface_hub.serialization import split_state_dict_into_shards_factory
from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import AutoConfig, BitsAndBytesConfig

from . import adapters, env, folders, memory, models
from .models import base_folder, open_weights

INTO = ("dequantized", "original")
SHARD = 10**9  # bytes, of 16-bit weights
# Bytes a weight of a matrix takes while it is merged, less the 2 that its shard counts:
# three fp32 copies in bitsandbytes' quantize_4bit on a CPU; or the change, and the sum.
WORK = {"dequantized": 10, "original": 4}
PREFIX = "base_model.model."  # what peft writes before a module's name
NOTE = "merged.json"  # in the merged model's folder: says what was merged into what
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


def lora_change(A: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
    """What an adapter adds to its weight, (alpha / r) B A: (out, in), fp32.

    `A` is (r, in), `B` is (out, r). Source: LoRA (Hu et al. 2021), section 4.1.
    """
    return (scaling * B.float()) @ A.float()


def through_nf4(weight: torch.Tensor) -> torch.Tensor:
    """The weight as NF4 with double quantization keeps it: shape and dtype as given."""
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return dequantize_4bit(packed, state)


def merge_folder(
    base: str,
    adapter,
    out,
    into: str = "dequantized",
    shard_bytes: int = SHARD,
    revision: str | None = None,
) -> Path:
    """Write base plus adapter as a 16-bit model to `out`: the whole folder or none.

    base: as load_base takes it. adapter: a folder of `adapters.save_adapter`. into:
    "dequantized", the NF4 weights that the adapter was trained on, in 16 bits, or
    "original", the base's own. Weights keep the dtype of the base's files. Held at
    once are one shard of `shard_bytes` and the work on one matrix: `work_bytes`.
    revision: of a Hub id; by default the commit that the adapter's note names.

    Raises ValueError for an adapter that is more than B A, and what `check_adapter`
    raises. Raises FileExistsError if `out` is the base or the adapter, or holds
    anything that this package did not write.
    """
    if into not in INTO:
        raise ValueError(f"into={into!r}: expected one of {', '.join(INTO)}")
    adapter = Path(adapter).expanduser()
    known = adapters.base_of(adapter)
    revision = revision or remembered(base, adapter)
    adapters.tensor_names(adapter)  # it is complete, or an error says what is damaged
    inputs = {"the adapter": adapter}
    if base != models.EMBEDDED:  # a Hub id is no folder, and is compared below
        inputs["the base"] = Path(base).expanduser()
    folders.check_out(out, NOTE, inputs)  # before a base is fetched
    source = base_folder(base, revision)
    inputs["the base"] = source
    folders.check_out(out, NOTE, inputs)
    pairs = read_pairs(adapter)
    files = tensors_of(source)
    _check_fit(pairs, files, source, adapter)
    _check_whole(adapter, source, files)
    adapters.check_adapter(adapter, models.base_identity(base, revision))
    linear = four_bit_weights(source, adapter) if into == "dequantized" else {}
    shards = split(files, shard_bytes)
    facts = {"base": known["name"], "revision": known["revision"], "into": into}
    with folders.written_whole(out, NOTE, facts, inputs) as made:
        with tqdm(total=len(files), desc="merging", unit="tensor", delay=5) as bar:
            for file, names in shards.filename_to_tensors.items():
                shard = {}
                for name in names:
                    with open_weights(files[name][0]) as opened:
                        weight = opened.get_tensor(name)
                    shard[name] = merged(weight, pairs.get(name), linear.get(name))
                    bar.update()
                save_file(shard, made / file, metadata={"format": "pt"})
        if shards.is_sharded:
            index = {
                "metadata": shards.metadata,
                "weight_map": shards.tensor_to_filename,
            }
            text = json.dumps(index, indent=1)
            (made / models.INDEX).write_text(text, "utf-8")
        copy_rest(source, made, models.CONFIGS)
        # whole from one of them: a chat template of the other would change the prompt
        own = any((adapter / name).exists() for name in models.VOCABULARIES)
        copy_rest(adapter if own else source, made, models.TOKENIZER)
    return Path(out).expanduser()


def remembered(base: str, adapter) -> str | None:
    """The revision of `base` that the adapter was trained on; None for other bases."""
    known = adapters.base_of(adapter)
    if known["name"] != base or Path(base).expanduser().is_dir():
        return None
    return known["revision"]


def merged(weight, pair, four_bit):
    """One tensor of the merged model: (out, in), in the dtype that it came in.

    pair: the adapter's (A, B, scaling), or None. four_bit: the dtype in which the
    weight was quantized, or None for a weight that was not.
    """
    dtype = weight.dtype
    if four_bit is not None:
        weight = through_nf4(weight.to(four_bit))
    if pair is not None:
        change = lora_change(*pair)  # fp32, so that the sum is rounded once
        weight = change.add_(weight)
    return weight.to(dtype)


def work_bytes(
    base: str, adapter, into: str = "dequantized", shard_bytes: int = SHARD
) -> int:
    """The most that `merge_folder` holds at once, on a CPU: predicted from shapes.

    Of the fullest shard the tensors that change (the others are mapped, from file to
    file), the work on the largest matrix, and the adapter.
    """
    source = base_folder(base)
    files, pairs = tensors_of(source), read_pairs(adapter)
    changed = set(pairs)
    if into == "dequantized":
        changed |= set(four_bit_weights(source, adapter))
    shards = split(files, shard_bytes).filename_to_tensors.values()
    fullest = max(sum(files[n][1] for n in names if n in changed) for names in shards)
    sizes = (A.shape[1] * B.shape[0] for A, B, _ in pairs.values())
    largest = max(sizes, default=0)
    kept = sum(A.nbytes + B.nbytes for A, B, _ in pairs.values())
    return fullest + WORK[into] * largest + kept


def split(files, shard_bytes: int):
    """Which tensors go into which file of the merged model: huggingface_hub's plan."""
    return split_state_dict_into_shards_factory(
        {name: size for name, (_, size) in files.items()},
        get_storage_size=lambda size: size,
        get_storage_id=lambda size: None,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )


def tensors_of(folder: Path) -> dict[str, tuple[Path, int]]:
    """Each tensor's file and bytes, in the files' order, read from their headers."""
    found = {}
    for file in models.weight_files(folder):
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
    given = models.read_json(Path(adapter) / adapters.CONFIG, "peft_type")
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
    rows, needed = models.embedding_rows(source), adapters.token_rows(adapter)
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


def copy_rest(source: Path, target: Path, patterns) -> None:
    """Copy what matches a pattern from a model's folder."""
    for file in source.iterdir():
        if any(fnmatch(file.name, one) for one in patterns):
            copy = shutil.copytree if file.is_dir() else shutil.copyfile
            copy(file, target / file.name)


def main(arguments=None) -> None:
    """The command line: merge, and say what memory it took."""
    parser = argparse.ArgumentParser("python -m qlora_helpers.merge")
    parser.add_argument("base", help="embedded, a folder, or a Hub id")
    parser.add_argument("adapter", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--into", choices=INTO, default="dequantized")
    parser.add_argument("--shard-mb", type=int, default=SHARD // 10**6)
    parser.add_argument("--revision", help="of a Hub id; default: the adapter's")
    given = parser.parse_args(arguments)
    env.quiet()
    size = given.shard_mb * 10**6
    env.return_freed_memory()
    try:
        given.revision = given.revision or remembered(given.base, given.adapter)
        source = base_folder(given.base, given.revision)
        predicted = work_bytes(str(source), given.adapter, given.into, size)
        with memory.private_peak() as found:
            merge_folder(
                given.base, given.adapter, given.out, given.into, size, given.revision
            )
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"predicted {predicted / 1e6:.0f} MB, held {found['bytes'] / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
