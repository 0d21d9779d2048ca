"""Run the notebooks as they stand and record their seconds and memory.

    python benchmarks/notebooks.py [--cap-gib 15] [--outputs] [06 ...]

Adds this machine's rows to data/measured/notebooks.json. With a cap, torch may not take
more GPU memory than that: the profile of a T4 (QLORA_PROFILE=fp16) under 15 GiB. With
--outputs the same execution also gives the notebook its outputs, as `make outputs`.
"""

import argparse
import json
import os
import time

import common
import nbformat

from qlora_helpers import env
from tools import course, recorder

CAP = """from qlora_helpers import memory
memory.hold_to({cap})"""
PEAKS = """import json, resource, torch
gpu = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
ram = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([ram, gpu]))"""


def measure(path, cap: float | None, outputs: bool) -> dict:
    """One row: a notebook's seconds, peak resident memory, and GPU memory reserved."""
    machine = env.profile()
    notebook = nbformat.read(path, as_version=4)
    if cap:
        notebook.cells.insert(0, nbformat.v4.new_code_cell(CAP.format(cap=cap)))
    notebook.cells.append(nbformat.v4.new_code_cell(PEAKS))
    start = time.monotonic()
    done = course.execute(path, notebook)
    seconds = round(time.monotonic() - start)
    ram, gpu = json.loads(done.cells.pop().outputs[-1]["text"])
    if outputs:
        course.store(path, done)
    dtype = str(machine.compute_dtype).removeprefix("torch.")
    cores = os.cpu_count()
    cpu = "two CPU cores" if cores == 2 else f"{cores} CPU cores"
    return {
        "notebook": path.stem,
        "machine": cpu if machine.use_cpu else recorder.facts()["gpu"],
        "computes_in": dtype,
        "cap_gib": cap,
        "seconds": seconds,
        "peak_ram_gib": common.gib(ram, 2),
        "peak_gpu_gib": common.gib(gpu, 2),
        "facts": recorder.facts(),
    }


def main(names: list[str], cap: float | None, outputs: bool) -> None:
    for path in course.find(names):
        same = ("notebook", "machine", "computes_in", "cap_gib")
        common.record("notebooks", [measure(path, cap, outputs)], same)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="such as 06; left out: all")
    parser.add_argument("--cap-gib", type=float)
    parser.add_argument("--outputs", action="store_true")
    given = parser.parse_args()
    if given.cap_gib and given.outputs:
        parser.error("--outputs without --cap-gib: the cap is one more cell")
    main(given.names, given.cap_gib, given.outputs)
