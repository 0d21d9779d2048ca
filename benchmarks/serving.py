"""Time generation in 4 bits with an adapter, in 4 bits, and in 16; on an NVIDIA GPU.

    python benchmarks/serving.py [products] [135M] [1B] [8B]

Writes data/measured/serving.json. Random weights take the same time as trained ones.
`tokens_per_second` is that of `generate`, prompt included. `step_ms` is one decoding
step, all rows together, as called from Python. `gpu_ms` is how long the GPU's kernels
ran in it (torch.profiler). `least_ms` is what reading the weights once takes at the
bandwidth with which this card copies. The rows of a matrix are one product of a random
8B's MLP weight, in eval mode.
"""

import functools
import math
import statistics
import sys
import time

import common
import torch
from bitsandbytes.nn import Linear4bit
from peft import get_peft_model

from qlora_helpers import env, memory, models, score, train

SHAPES = ("135M", "1B", "8B")
BATCHES = (1, 8, 32)
VARIANTS = ("4-bit and adapter", "4-bit, merged", "16-bit, merged")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
MATRIX = (14336, 4096)  # up_proj of an 8B: out, in
REPEATS, PRODUCTS = 50, 10
PROMPT = 64  # tokens before the timed steps


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


def generation(shape: str, variant: str):
    """Yield tokens per second and memory by the batch."""
    model = model_of(shape, variant)
    held = {p.data_ptr(): memory.tensor_bytes(p) for p in model.parameters()}
    least = sum(held.values()) / bandwidth()
    for batch in BATCHES:
        with memory.peak() as peak:
            speed = score.generation_speed(model, batch)
        row = {"shape": shape, "variant": variant, "batch": batch}
        step, busy = decoding(model, batch)
        yield row | {
            "tokens_per_second": round(speed, 1),
            "step_ms": round(1e3 * step, 2),
            "gpu_ms": round(1e3 * busy, 2),
            "least_ms": round(1e3 * least, 2),
            "weights_gib": common.gib(sum(held.values()), 3),
            "peak_gib": common.gib(peak["bytes"], 3),
        }


def decoding(model, batch: int, steps: int = 16):
    """Seconds of one decoding step (median), and of the GPU's kernels within one."""
    ids = torch.full((batch, PROMPT), 10, device=model.device)
    seconds = []
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        token = ids[:, :1]

        def step():
            model(input_ids=token, past_key_values=cache, use_cache=True)
            common.synchronize()

        for _ in range(steps):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(steps):
                step()
    kernels = sum(event.self_device_time_total for event in profile.key_averages())
    return statistics.median(seconds), kernels / 1e6 / steps


def bandwidth() -> float:
    """Bytes a second that this card reads and writes when it copies."""
    if not torch.cuda.is_available():
        return math.nan
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    copy = torch.empty_like(source)
    times = []
    for _ in range(10):
        common.synchronize()
        start = time.perf_counter()
        copy.copy_(source)
        common.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / statistics.median(times)


def products():
    """Yield microseconds of x W.T by the rows of x; the weight in 16 and in 4 bits."""
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
    for kind, layer in layers.items():
        for count in ROWS:
            x = torch.randn(
                count, width, device=machine.device, dtype=machine.compute_dtype
            )
            with torch.no_grad():
                ways = {"as called": functools.partial(repeat, layer, x)}
                if x.is_cuda:  # the GPU's own time, without Python's
                    ways["CUDA graph"] = captured(layer, x).replay
                for way, products in ways.items():
                    times = [once(products) for _ in range(REPEATS)]
                    row = {"matrix": f"{out}x{width}", "kind": kind, "rows": count}
                    row["way"] = way
                    row["microseconds"] = round(1e6 * statistics.median(times), 1)
                    yield row


def repeat(layer, x) -> None:
    for _ in range(PRODUCTS):
        layer(x)


def captured(layer, x) -> torch.cuda.CUDAGraph:
    """PRODUCTS products as one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        repeat(layer, x)
    return graph


def once(products) -> float:
    """Seconds of one product, of PRODUCTS: a single one is too short to time."""
    common.synchronize()
    start = time.perf_counter()
    products()
    common.synchronize()
    return (time.perf_counter() - start) / PRODUCTS


def main(names) -> None:
    env.quiet()
    names = common.names_or_all(names, ["products", *SHAPES])
    if "products" in names:
        same = ("matrix", "kind", "rows", "way")
        common.record("serving", products(), same)
    for shape in [name for name in names if name in SHAPES]:
        for variant in VARIANTS:
            same = ("shape", "variant", "batch")
            common.record("serving", generation(shape, variant), same)
            common.clean()


if __name__ == "__main__":
    main(sys.argv[1:])
