"""Measure the bytes of a run: what it keeps, and its peak."""

import contextlib
import threading

import psutil
import torch
from bitsandbytes.nn import Params4bit

from . import env


def tensor_bytes(parameter: torch.Tensor) -> int:
    """Bytes of a parameter, of a 4-bit one with its scales and tables."""
    state = getattr(parameter, "quant_state", None)
    if not isinstance(parameter, Params4bit) or state is None:
        return parameter.nbytes
    tensors = [parameter, state.absmax, state.code]
    if state.nested:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    return sum(tensor.nbytes for tensor in tensors)


def state_bytes(model, optimizer) -> dict[str, int]:
    """Bytes that a run keeps from step to step, by kind, counted on its tensors.

    Gradients are gone between two steps, so they are not counted but inferred: each
    trained parameter has one of its own shape and dtype.
    """
    parameters = list(model.parameters())
    states = [t for s in optimizer.state.values() for t in s.values()]
    return {
        "base model": sum(tensor_bytes(p) for p in parameters if not p.requires_grad),
        "adapters": sum(p.nbytes for p in parameters if p.requires_grad),
        "gradients": sum(p.nbytes for p in parameters if p.requires_grad),
        "optimizer": sum(t.nbytes for t in states if isinstance(t, torch.Tensor)),
    }


@contextlib.contextmanager
def peak():
    """Yield a dict that holds `bytes` at the end: the most held while it was open.

    On a GPU it is what torch allocated there; on a CPU, where torch keeps no count,
    the resident memory of the whole process, libraries included, seen ten times a
    second.
    """
    found = {}
    device = env.profile().device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found["bytes"] = torch.cuda.max_memory_allocated(device)
        return
    process, done = psutil.Process(), threading.Event()
    found["bytes"] = process.memory_info().rss

    def watch():
        while not done.wait(0.1):
            found["bytes"] = max(found["bytes"], process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
