"""Merge an adapter into its base, shard by shard: neither model is ever held whole.

    python -m qlora_helpers.merge BASE ADAPTER OUT --into dequantized --shard-mb 1000

Notebook 07 writes out `lora_change` and `through_nf4`, and says which base to take.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from huggingface_hub import snapshot_download
from huggingface_hub.serialization import split_state_dict_into_shards_factory
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import BitsAndBytesConfig

from . import adapters, env, memory, models

INTO = ("dequantized", "original")
SHARD = 10**9  # bytes, of 16-bit weights
# Bytes a weight of a matrix takes while it is merged, less the 2 that its shard counts:
# three fp32 copies in bitsandbytes' quantize_4bit on a CPU; or the change, and the sum.
WORK = {"dequantized": 10, "original": 4}
PREFIX = "base_model.model."  # what peft writes before a module's name
# What makes an adapter more than B A added to some linear weights.
MORE = ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias")


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
    base: str, adapter, out, into: str = "dequantized", shard_bytes: int = SHARD
) -> Path:
    """Write base plus adapter as a 16-bit model; the folder `out`, made whole or not.

    base: as load_base takes it. adapter: a folder of `adapters.save_adapter`. into:
    "dequantized", the NF4 weights that the adapter was trained on, in 16 bits, or
    "original", the base's own. Weights keep the dtype of the base's files. Held at
    once are one shard of `shard_bytes` and the work on one matrix: `work_bytes`.

    Raises ValueError for an adapter that is more than B A, and what `check_adapter`
    raises; FileExistsError where `out` is no folder of a merged model.
    """
    if into not in INTO:
        raise ValueError(f"into={into!r}: expected one of {', '.join(INTO)}")
    source, out = base_folder(base), Path(out)
    if out.exists() and not (out.is_dir() and (out / "config.json").exists()):
        raise FileExistsError(f"{out} is there and is no model: name another folder")
    adapters.check_adapter(adapter, models.base_identity(base))
    pairs = read_pairs(adapter)
    linear = four_bit_weights(base, adapter) if into == "dequantized" else {}
    files = tensors_of(source)
    if missing := [name for name in pairs if name not in files]:
        raise ValueError(f"the base has no {missing[0]}, which the adapter changes")
    shards = split(files, shard_bytes)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as beside:
        made = Path(beside) / "model"
        made.mkdir()
        with tqdm(total=len(files), desc="merging", unit="tensor", delay=5) as bar:
            for file, names in shards.filename_to_tensors.items():
                shard = {}
                for name in names:
                    with safe_open(files[name][0], "pt") as opened:
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
            (made / "model.safetensors.index.json").write_text(text, "utf-8")
        copy_rest(source, made)
        copy_rest(Path(adapter), made, only="token")
        if out.exists():
            out.replace(Path(beside) / "old")
        made.replace(out)
    return out


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
    files, pairs = tensors_of(base_folder(base)), read_pairs(adapter)
    changed = set(pairs)
    if into == "dequantized":
        changed |= set(four_bit_weights(base, adapter))
    shards = split(files, shard_bytes).filename_to_tensors.values()
    fullest = max(sum(files[n][1] for n in names if n in changed) for names in shards)
    largest = max(A.shape[1] * B.shape[0] for A, B, _ in pairs.values())
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


def base_folder(base: str) -> Path:
    """The folder with a base's safetensors: fetched, where it is a Hub id."""
    if base == models.EMBEDDED:
        return models.embedded_dir()
    if os.path.isdir(base):
        return Path(base)
    with models.hub_errors_explained(base):
        return Path(
            snapshot_download(
                base,
                revision=models.base_identity(base)["revision"],
                allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model"],
                local_files_only=models.only_cached(base),
            )
        )


def tensors_of(folder: Path) -> dict[str, tuple[Path, int]]:
    """Each tensor's file and bytes, in the files' order, from their headers alone."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
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

    Raises ValueError for an adapter that is more than B A.
    """
    config = LoraConfig.from_pretrained(adapter)
    if more := [key for key in MORE if getattr(config, key, None)]:
        raise ValueError(
            f"the adapter in {adapter} has {more[0]}: it is more than B A; merge it in "
            "memory, with PEFT's merge_and_unload()"
        )
    tensors = load_file(Path(adapter) / adapters.WEIGHTS)
    pairs = {}
    for name, A in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        B = tensors[name.replace(".lora_A.", ".lora_B.")]
        rank = config.rank_pattern.get(
            get_pattern_key(config.rank_pattern, module), config.r
        )
        alpha = config.alpha_pattern.get(
            get_pattern_key(config.alpha_pattern, module), config.lora_alpha
        )
        scaling = alpha / (rank**0.5 if config.use_rslora else rank)
        pairs[f"{module}.weight"] = (A, B, scaling)
    return pairs


def four_bit_weights(base: str, adapter) -> dict[str, torch.dtype]:
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
    model, _ = models.skeleton(models.config_of(base), quantization, dtype)
    layers = model.named_modules()
    return {f"{n}.weight": dtype for n, m in layers if isinstance(m, Linear4bit)}


def copy_rest(source: Path, target: Path, only: str = "") -> None:
    """Copy what belongs to a model and is no weight: config, tokenizer, template."""
    for file in source.iterdir():
        belongs = file.suffix in (".json", ".jinja", ".model")
        ours = file.name in (models.MANIFEST, "base.json", "training.json")
        index = file.name.endswith(".index.json") or file.name == "adapter_config.json"
        chosen = only in file.name or file.suffix == ".jinja"
        if belongs and chosen and not ours and not index:
            shutil.copyfile(file, target / file.name)


def main(arguments=None) -> None:
    """The command line: merge, and say what memory it took."""
    parser = argparse.ArgumentParser("python -m qlora_helpers.merge")
    parser.add_argument("base", help="embedded, a folder, or a Hub id")
    parser.add_argument("adapter", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--into", choices=INTO, default="dequantized")
    parser.add_argument("--shard-mb", type=int, default=SHARD // 10**6)
    given = parser.parse_args(arguments)
    env.quiet()
    size = given.shard_mb * 10**6
    env.return_freed_memory()
    predicted = work_bytes(given.base, given.adapter, given.into, size)
    with memory.private_peak() as found:
        merge_folder(given.base, given.adapter, given.out, given.into, size)
    print(f"predicted {predicted / 1e6:.0f} MB, held {found['bytes'] / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
