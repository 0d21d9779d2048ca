"""Time generation in 4 bits with an adapter, in 4 bits, and in 16; on an NVIDIA GPU.

    python benchmarks/serving.py

Writes data/measured/serving.json. Random weights take the same time as trained ones.
The rows of a matrix are one product of a random 8B's MLP weight, in eval mode.
"""

import sys
import time

import torch
from bitsandbytes.nn import Linear4bit
from peft import get_peft_model

from qlora_helpers import env, evaluate, memory, models, recorded, train

SHAPES = ("135M", "1B", "8B")
BATCHES = (1, 8, 32)
VARIANTS = ("4-bit and adapter", "4-bit, merged", "16-bit, merged")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
MATRIX = (14336, 4096)  # up_proj of an 8B: out, in
REPEATS = 50


def model_of(shape: str, variant: str):
    quantization = None
    if variant != VARIANTS[2]:
        quantization = train.nf4_config(env.profile())
    if shape == "135M":
        shape = models.config_of(models.EMBEDDED)
    model = models.random_llama(shape, quantization)
    if variant == VARIANTS[0]:
        model = get_peft_model(model, train.lora_config())
    return model.eval()


def generation(shape: str, variant: str) -> list[dict]:
    model = model_of(shape, variant)
    held = {p.data_ptr(): memory.tensor_bytes(p) for p in model.parameters()}
    rows = []
    for batch in BATCHES:
        with memory.peak() as peak:
            speed = evaluate.generation_speed(model, batch)
        row = {"shape": shape, "variant": variant, "batch": batch}
        row |= {
            "tokens_per_second": round(speed, 1),
            "weights_gib": round(sum(held.values()) / env.GIB, 3),
            "peak_gib": round(peak["bytes"] / env.GIB, 3),
        }
        print(row, flush=True)
        rows.append(row)
    return rows


def products() -> list[dict]:
    """Microseconds of x W.T by the rows of x, for one weight in 16 and in 4 bits."""
    machine = env.profile()
    out, width = MATRIX
    torch.manual_seed(0)
    plain = torch.nn.Linear(width, out, bias=False, dtype=machine.compute_dtype)
    four = Linear4bit(
        width,
        out,
        bias=False,
        quant_type="nf4",
        compute_dtype=machine.compute_dtype,
        compress_statistics=True,
    )
    four.load_state_dict(plain.state_dict())
    layers = {"bf16": plain.to(machine.device), "nf4": four.to(machine.device)}
    rows = []
    for kind, layer in layers.items():
        for count in ROWS:
            x = torch.randn(
                count, width, device=machine.device, dtype=machine.compute_dtype
            )
            with torch.no_grad():
                times = sorted(once(layer, x) for _ in range(REPEATS))
            row = {"matrix": f"{out}x{width}", "kind": kind, "rows": count}
            row["microseconds"] = round(1e6 * times[len(times) // 2], 1)
            print(row, flush=True)
            rows.append(row)
    return rows


def once(layer, x) -> float:
    """Seconds of ten products, by ten: a single one is too short to time."""
    synchronize = torch.cuda.synchronize if x.is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(10):
        layer(x)
    synchronize()
    return (time.perf_counter() - start) / 10


def main(shapes) -> None:
    env.quiet()
    rows = products()
    for shape in shapes:
        for variant in VARIANTS:
            rows += generation(shape, variant)
            recorded.write("serving", recorded.facts(), rows)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main(sys.argv[1:] or SHAPES)
