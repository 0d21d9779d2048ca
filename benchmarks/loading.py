"""Measure the memory of a process that loads a 16-bit model into 4 bits.

    python benchmarks/loading.py

Writes data/measured/loading.json, on any Linux machine. Random weights are saved as
safetensors and loaded in a process of its own. Counted is memory of the process alone
(anonymous); the files' pages are mapped, and the system drops them when it must.
"""

import copy
import gc
import json
import pathlib
import subprocess
import sys
import tempfile

from transformers import AutoModelForCausalLM

from qlora_helpers import env, memory, models, recorded, train

SHAPES = {"1B": 16, "3B": 28, "8B": 6}  # layers: of the 8B a few, for this disk's sake


def load(folder: str) -> dict:
    """Load a model as the recipe does: its weights, and the most that was held."""
    quantization = train.nf4_config(env.profile())
    with memory.private_peak() as most:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=quantization.bnb_4bit_compute_dtype,
            quantization_config=quantization,
            device_map={"": "cpu"},
            use_safetensors=True,
        )
    weights = {p.data_ptr(): memory.tensor_bytes(p) for p in model.parameters()}
    largest = max(p.nbytes for p in model.parameters())
    return {
        "weights_gib": round(sum(weights.values()) / env.GIB, 3),
        "most_gib": round(most["bytes"] / env.GIB, 3),
        "largest_tensor_gib": round(largest / env.GIB, 3),
    }


def main() -> None:
    rows = []
    for shape, layers in SHAPES.items():
        config = copy.deepcopy(models.llama_config(shape))
        config.num_hidden_layers = layers
        with tempfile.TemporaryDirectory() as folder:
            model = models.random_llama(config)
            model.bfloat16().save_pretrained(folder)
            del model
            gc.collect()
            files = pathlib.Path(folder).glob("*.safetensors")
            size = sum(file.stat().st_size for file in files)
            done = subprocess.run(
                [sys.executable, __file__, folder],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
        row = {"shape": shape, "layers": layers, "files_gib": round(size / env.GIB, 3)}
        rows.append(row | json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    recorded.write("loading", recorded.facts(), rows)


if __name__ == "__main__":
    env.quiet()
    if sys.argv[1:]:
        print(json.dumps(load(sys.argv[1])))
    else:
        main()
