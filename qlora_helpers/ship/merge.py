"""Merge an adapter into its base, shard by shard: neither model is ever held whole.

    python -m qlora_helpers.ship.merge BASE ADAPTER OUT --into dequantized

Notebook 07 writes out `lora_change` and `through_nf4`, and says which base to take.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tqdm.auto import tqdm

from qlora_helpers import adapters, env, folders, model_files, models
from qlora_helpers.memory import private_peak
from qlora_helpers.models import base_folder
from qlora_helpers.ship.mergeable import four_bit_weights, read_pairs, tensors_of

INTO = ("dequantized", "original")
SHARD = 10**9  # bytes, of 16-bit weights
# Bytes a weight of a matrix takes while it is merged, less the 2 that its shard counts:
# three fp32 copies in bitsandbytes' quantize_4bit on a CPU; or the change, and the sum.
WORK = {"dequantized": 10, "original": 4}
NOTE = "merged.json"  # in the merged model's folder: says what was merged into what


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
    """Write base plus adapter as a 16-bit model to `out`: the whole folder or none.

    base: as load_base takes it; of a Hub id the commit that the adapter's note names.
    adapter: a folder of `adapters.save_adapter`. into: "dequantized", the NF4 weights
    that the adapter was trained on, or "original", the base's own. Weights keep the
    dtype of the base's files. `work_bytes` predicts what is held at once.

    Raises ValueError for an adapter that is more than B A, and what `check_adapter`
    raises; FileExistsError if `out` is the base or the adapter, or holds anything that
    this package did not write.
    """
    if into not in INTO:
        raise ValueError(f"into={into!r}: expected one of {', '.join(INTO)}")
    adapter = Path(adapter).expanduser()
    known, revision = adapters.base_of(adapter), remembered(base, adapter)
    inputs = {"the adapter": adapter, "the base": Path(base).expanduser()}
    folders.check_out(out, NOTE, inputs)  # before a base is fetched
    source = inputs["the base"] = base_folder(base, revision)
    pairs = read_pairs(adapter, source)
    adapters.check_adapter(adapter, models.base_identity(base, revision))
    four_bit = four_bit_weights(source, adapter) if into == "dequantized" else {}
    files = tensors_of(source)
    shards = split(files, shard_bytes)
    facts = {"base": known["name"], "revision": known["revision"], "into": into}
    with folders.written_whole(out, NOTE, facts, inputs) as made:
        for file, names in shards.filename_to_tensors.items():
            shard = {}
            for name in tqdm(names, desc=f"merging {file}", delay=5):
                with model_files.open_weights(files[name][0]) as opened:
                    weight = opened.get_tensor(name)
                shard[name] = merge_tensor(weight, pairs.get(name), four_bit.get(name))
            save_file(shard, made / file, metadata={"format": "pt"})
        if shards.is_sharded:
            where = shards.tensor_to_filename
            index = {"metadata": shards.metadata, "weight_map": where}
            (made / model_files.INDEX).write_text(json.dumps(index, indent=1), "utf-8")
        copy_rest(source, made, model_files.CONFIGS)
        # whole from one of them: a chat template of the other would change the prompt
        tokenizer = adapter if model_files.has_tokenizer(adapter) else source
        copy_rest(tokenizer, made, model_files.TOKENIZER)
    return Path(out).expanduser()


def remembered(base: str, adapter) -> str | None:
    """The revision of `base` that the adapter was trained on; None for other bases."""
    known = adapters.base_of(adapter)
    same = known["name"] == base and not Path(base).expanduser().is_dir()
    return known["revision"] if same else None


def merge_tensor(weight, pair, four_bit):
    """One tensor of the merged model, in the shape and dtype that it came in.

    pair: A, B and scaling, or None. four_bit: the dtype it was quantized in, or None.
    """
    dtype = weight.dtype
    if four_bit is not None:
        weight = through_nf4(weight.to(four_bit))
    if pair is not None:
        weight = lora_change(*pair).add_(weight)  # fp32, so that it is rounded once
    return weight.to(dtype)


def work_bytes(base: str, adapter, into: str, shard_bytes: int) -> int:
    """The most that `merge_folder` holds at once, on a CPU: predicted from shapes.

    It holds those tensors of the fullest shard that change (the others are mapped, from
    file to file), the work on the largest matrix, and the adapter.
    """
    source = base_folder(base, remembered(base, adapter))
    files, pairs = tensors_of(source), read_pairs(adapter, source)
    changed = set(pairs)
    if into == "dequantized":
        changed |= set(four_bit_weights(source, adapter))
    fullest = 0
    for names in split(files, shard_bytes).filename_to_tensors.values():
        held = sum(files[name][1].nbytes for name in changed.intersection(names))
        fullest = max(fullest, held)
    largest = max(files[name][1].numel() for name in pairs)
    kept = sum(A.nbytes + B.nbytes for A, B, _ in pairs.values())
    return fullest + WORK[into] * largest + kept


def split(files, shard_bytes: int):
    """Which tensors go into which file of the merged model: huggingface_hub's plan."""
    tensors = {name: tensor for name, (_, tensor) in files.items()}
    return split_torch_state_dict_into_shards(tensors, max_shard_size=shard_bytes)


def copy_rest(source: Path, target: Path, patterns) -> None:
    """Copy what matches a pattern from a model's folder."""
    for file in {file for pattern in patterns for file in source.glob(pattern)}:
        copy = shutil.copytree if file.is_dir() else shutil.copyfile
        copy(file, target / file.name)


def main() -> None:
    """The command line: merge, and say what memory it took."""
    parser = argparse.ArgumentParser("python -m qlora_helpers.ship.merge")
    parser.add_argument("base", help="embedded, a folder, or a Hub id")
    parser.add_argument("adapter")
    parser.add_argument("out")
    parser.add_argument("--into", choices=INTO, default="dequantized")
    parser.add_argument("--shard-mb", type=int, default=SHARD // 10**6)
    given = parser.parse_args()
    env.quiet()
    env.return_freed_memory()
    if given.shard_mb < 1:
        parser.error(f"--shard-mb is {given.shard_mb}: give 1 or more")
    how = given.into, given.shard_mb * 10**6
    try:
        predicted = work_bytes(given.base, given.adapter, *how)
        with private_peak() as held:
            merge_folder(given.base, given.adapter, given.out, *how)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"predicted {predicted / 1e6:.0f} MB, held {held['bytes'] / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
