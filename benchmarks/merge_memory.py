"""Measure the memory of a merge: in memory with PEFT, and shard by shard.

    python benchmarks/merge_memory.py [embedded] [1B] [8B]

Writes data/measured/merge_memory.json, on any Linux machine. Each merge runs in a
process of its own, with random weights and a random adapter for the larger shapes;
counted is what it held on top of its libraries, that no file backs.
"""

import gc
import json
import pathlib
import subprocess
import sys
import tempfile

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from qlora_helpers import adapters, env, memory, merge, models, recorded, train

SHAPES = ("embedded", "1B", "8B")
WAYS = {  # name: where into, shard in MB; "": in memory
    "in memory, into original": ("original", ""),
    "in memory, into dequantized": ("dequantized", ""),
    "in memory, into 4 bits": ("4 bits", ""),
    "shards of 1 GB, original": ("original", "1000"),
    "shards of 1 GB, dequantized": ("dequantized", "1000"),
    "shards of 60 MB, dequantized": ("dequantized", "60"),
}


def make(shape: str, folder: pathlib.Path):
    """A base with random weights and an adapter that changes it, on disk."""
    if shape == models.EMBEDDED:
        return models.EMBEDDED, env.path("data/adapter")
    base, adapter = folder / "base", folder / "adapter"
    model = models.random_llama(shape)
    model.bfloat16().save_pretrained(base, max_shard_size="2GB")
    del model
    gc.collect()
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


def in_memory(base: str, adapter: str, out: str, into: str) -> dict:
    """Merge with PEFT and save, as tutorials do: bytes of the result, and held."""
    source = merge.base_folder(base)
    files = merge.tensors_of(source)
    weights = sum(size for _, size in files.values())
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
    pairs = merge.read_pairs(adapter)
    changed = sum(A.nbytes + B.nbytes for A, B, _ in pairs.values())
    changed *= 4 // next(iter(pairs.values()))[0].itemsize  # PEFT loads them in fp32
    return {"predicted": weights + changed, "held": held["bytes"]}


def by_shards(base: str, adapter: str, out: str, into: str, shard: str) -> dict:
    size = int(shard) * 10**6
    env.return_freed_memory()
    predicted = merge.work_bytes(base, adapter, into, size)
    with memory.private_peak() as held:
        merge.merge_folder(base, adapter, out, into, size)
    return {"predicted": predicted, "held": held["bytes"]}


def main(shapes) -> None:
    try:
        rows = recorded.read("merge_memory")["rows"]
    except FileNotFoundError:
        rows = []
    rows = [row for row in rows if row["shape"] not in shapes]
    for shape in shapes:
        with tempfile.TemporaryDirectory(dir=env.cache_dir()) as folder:
            folder = pathlib.Path(folder)
            base, adapter = make(shape, folder)
            for way, (into, shard) in WAYS.items():
                command = [sys.executable, __file__, "--one", base, str(adapter)]
                command += [str(folder / "out"), into, shard]
                done = subprocess.run(
                    command, stdout=subprocess.PIPE, text=True, check=True
                )
                found = json.loads(done.stdout.splitlines()[-1])
                row = {"shape": shape, "way": way}
                row |= {
                    "predicted_gb": round(found["predicted"] / 1e9, 3),
                    "held_gb": round(found["held"] / 1e9, 3),
                }
                print(row, flush=True)
                rows.append(row)
                recorded.write("merge_memory", recorded.facts(), rows)


if __name__ == "__main__":
    env.quiet()
    if sys.argv[1:2] == ["--one"]:
        base, adapter, out, into, shard = sys.argv[2:]
        run = by_shards(base, adapter, out, into, shard) if shard else None
        print(json.dumps(run or in_memory(base, adapter, out, into)))
    else:
        main(sys.argv[1:] or SHAPES)
