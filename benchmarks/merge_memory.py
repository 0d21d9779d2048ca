"""Measure the memory of a merge: in memory with PEFT, and shard by shard.

    python benchmarks/merge_memory.py [embedded] [1B] [8B]

Writes data/measured/merge_memory.json, on any Linux machine. Each merge runs in a
process of its own. The larger shapes have random weights and a random adapter. What is
counted is the memory that no file backs, beyond what the libraries hold.
"""

import pathlib
import sys
import tempfile

import common
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from qlora_helpers import adapters, env, memory, models, train
from qlora_helpers.ship import merge, mergeable

SHAPES = ("embedded", "1B", "8B")
WAYS = {  # name: where into, shard in MB (None: in memory)
    "in memory, into original": ("original", None),
    "in memory, into dequantized": ("dequantized", None),
    "in memory, into 4 bits": ("4 bits", None),
    "shards of 1 GB, original": ("original", 1000),
    "shards of 1 GB, dequantized": ("dequantized", 1000),
    "shards of 60 MB, dequantized": ("dequantized", 60),
}


def make(shape: str, folder: pathlib.Path):
    """Write a base with random weights, and an adapter that changes it, to disk."""
    if shape == models.EMBEDDED:
        return models.EMBEDDED, env.path("data/adapter")
    base, adapter = folder / "base", folder / "adapter"
    model = models.random_llama(shape)
    model.bfloat16().save_pretrained(base, max_shard_size="2GB")
    del model
    common.clean()
    model, _ = models.skeleton(models.llama_config(shape), None, torch.bfloat16)
    model = get_peft_model(model, train.lora_config())
    changes = {}
    for name, weight in model.state_dict().items():
        if "lora_" in name:
            changes[name] = torch.randn(weight.shape, dtype=torch.float16) / 100
    quantization = train.nf4_config(env.profile())
    quantization.bnb_4bit_compute_dtype = torch.bfloat16
    model.config.quantization_config = quantization
    model.load_state_dict(changes, strict=False, assign=True)
    adapters.save_adapter(model, None, adapter, models.base_identity(str(base)))
    return str(base), adapter


def in_memory(base: str, adapter, out, into: str) -> tuple[int, int]:
    """Merge with PEFT and save, as tutorials do: bytes predicted, and held."""
    source = merge.base_folder(base)
    files = mergeable.tensors_of(source)
    weights = sum(tensor.nbytes for _, tensor in files.values())
    quantization = train.nf4_config(env.profile()) if into != "original" else None
    with memory.private_peak() as held:
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.bfloat16, quantization_config=quantization
        )
        if into == "dequantized":
            model = model.dequantize()
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        model.save_pretrained(out)
    if into == "4 bits":
        kept = {p.data_ptr(): memory.tensor_bytes(p) for p in model.parameters()}
        weights = sum(kept.values())
    pairs = mergeable.read_pairs(adapter, source)
    changed = sum(A.nbytes + B.nbytes for A, B, _ in pairs.values())
    changed *= 4 // next(iter(pairs.values()))[0].itemsize  # PEFT loads them in fp32
    return weights + changed, held["bytes"]


def by_shards(base: str, adapter, out, into: str, shard_bytes: int) -> tuple[int, int]:
    """Merge shard by shard: bytes predicted, and held."""
    env.return_freed_memory()
    predicted = merge.work_bytes(base, adapter, into, shard_bytes)
    with memory.private_peak() as held:
        merge.merge_folder(base, adapter, out, into, shard_bytes)
    return predicted, held["bytes"]


def measure(shape: str, way: str, base: str, adapter, out):
    """Merge in one of WAYS; yield the row."""
    into, shard = WAYS[way]
    if shard:
        predicted, held = by_shards(base, adapter, out, into, shard * 10**6)
    else:
        predicted, held = in_memory(base, adapter, out, into)
    row = {"shape": shape, "way": way}
    row |= {"predicted_gb": round(predicted / 1e9, 3), "held_gb": round(held / 1e9, 3)}
    yield row


def main(shapes) -> None:
    env.quiet()
    for shape in common.names_or_all(shapes, SHAPES):
        with tempfile.TemporaryDirectory(dir=env.cache_dir()) as folder:
            folder = pathlib.Path(folder)
            base, adapter = make(shape, folder)
            for way in WAYS:
                with tempfile.TemporaryDirectory(dir=folder) as place:
                    out = pathlib.Path(place) / "out"
                    rows = common.in_child(measure, shape, way, base, adapter, out)
                    common.record("merge_memory", rows, same=("shape", "way"))


if __name__ == "__main__":
    main(sys.argv[1:])
