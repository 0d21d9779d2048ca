"""Measure the memory of a process that loads a 16-bit model into 4 bits.

    python benchmarks/loading.py

Writes data/measured/loading.json, on any Linux machine. Random weights are saved as
safetensors and loaded in a process of its own. Only that process's own (anonymous)
memory is counted. The files' pages are mapped, and the system drops them when it must.
"""

import copy
import pathlib
import tempfile

import common
from transformers import AutoModelForCausalLM

from qlora_helpers import env, memory, models, train

SHAPES = {"1B": 16, "3B": 28, "8B": 6}  # layers; few of the 8B, because disks are small


def load(folder: str):
    """Load a model as the recipe does; yield its weights and the most held."""
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
    yield {
        "weights_gib": common.gib(sum(weights.values()), 3),
        "most_gib": common.gib(most["bytes"], 3),
        "largest_tensor_gib": common.gib(max(p.nbytes for p in model.parameters()), 3),
    }


def measure(shape: str, layers: int):
    """Save a model of random weights, and yield the row of loading it."""
    config = copy.deepcopy(models.llama_config(shape))
    config.num_hidden_layers = layers
    with tempfile.TemporaryDirectory() as folder:
        models.random_llama(config).bfloat16().save_pretrained(folder)
        common.clean()
        files = pathlib.Path(folder).glob("*.safetensors")
        size = common.gib(sum(file.stat().st_size for file in files), 3)
        for row in common.in_child(load, folder):
            yield {"shape": shape, "layers": layers, "files_gib": size} | row


def main() -> None:
    env.quiet()
    for shape, layers in SHAPES.items():
        common.record("loading", measure(shape, layers), same=("shape",))


if __name__ == "__main__":
    main()
