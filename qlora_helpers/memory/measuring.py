"""Measure the bytes of a training run, and hold torch to a smaller card."""

import contextlib
import threading
import weakref

import psutil
import torch
from bitsandbytes.nn import Params4bit
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_helpers import env
from qlora_helpers.memory.byte_formulas import dequantized_bytes
from qlora_helpers.memory.planned_run import in_blocks


def stored_tensors(parameter: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that a parameter is kept in: a 4-bit one's scales and tables too."""
    state = getattr(parameter, "quant_state", None)
    if not isinstance(parameter, Params4bit) or state is None:
        return [parameter]
    tensors = [parameter, state.absmax, state.code]
    if state.nested:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    return tensors


def tensor_bytes(parameter: torch.Tensor) -> int:
    """Bytes of a parameter, of a 4-bit one with its scales and tables."""
    return sum(tensor.nbytes for tensor in stored_tensors(parameter))


def state_bytes(model, optimizer) -> dict[str, int]:
    """Bytes that a run keeps from step to step, by kind, counted on its tensors.

    Gradients are gone between two steps, and count as much as the adapters. A tensor
    that several states share counts once.
    """
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    states = [t for state in optimizer.state.values() for t in state.values()]
    once = {id(t): t.nbytes for t in states if isinstance(t, torch.Tensor)}
    return {
        "base model": sum(map(tensor_bytes, model.parameters())) - trained,
        "adapters": trained,
        "gradients": trained,
        "optimizer": sum(once.values()),
    }


def hold_to(gib: float | None) -> None:
    """Let torch take at most `gib` GiB of the GPU, as of a smaller card; None: all.

    Managed memory (paged optimizer states) and CUDA's own are not counted. On a CPU
    nothing is held.
    """
    device = env.profile().device
    if gib is not None:
        env.check_gib("gib", gib)
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        share = 1.0 if gib is None else min(1.0, gib * env.GIB / whole)
        torch.cuda.set_per_process_memory_fraction(share, device)


def may_take() -> int:
    """Bytes that torch may still take on this GPU; ValueError where there is none.

    They are what the driver has free and torch has reserved without using it, and at
    most what hold_to leaves.
    """
    device = env.profile().device
    free, whole = torch.cuda.mem_get_info(device)
    used = torch.cuda.memory_allocated(device)
    free += torch.cuda.memory_reserved(device) - used
    limit = torch.cuda.get_per_process_memory_fraction(device) * whole
    return max(0, min(free, int(limit) - used))


@contextlib.contextmanager
def peak():
    """Yield a dict that holds `bytes` at the end: the most held while it was open.

    On a GPU it is what torch allocated there. On a CPU, where torch keeps no count, it
    is the resident memory of the whole process, seen ten times a second.
    """
    device, process = env.profile().device, psutil.Process()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        found = {}
        yield found
        found["bytes"] = torch.cuda.max_memory_allocated(device)
    else:
        with _largest(lambda: process.memory_info().rss, seconds=0.1) as found:
            yield found


def private_peak():
    """Yield a dict that holds `bytes` at the end: the most that was held on top.

    Only memory that no file backs counts (on Windows and macOS: all of the process's
    memory), because the system drops a mapped file's pages when it must.
    """
    process = psutil.Process()

    def private():
        info = process.memory_info()
        return info.rss - getattr(info, "shared", 0)

    before = private()
    return _largest(lambda: private() - before, seconds=0.005)


@contextlib.contextmanager
def _largest(read, seconds):
    """Yield a dict whose `bytes` is the largest of what `read()` gave until the end."""
    found, done = {"bytes": read()}, threading.Event()

    def watch():
        while not done.wait(seconds):
            found["bytes"] = max(found["bytes"], read())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


class Ledger(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is open, each storage once.

    `now` and `peak` are bytes. torch's MemTracker cannot take its place: it registers a
    gradient hook on every parameter, which raises at the first frozen one (torch 2.13).
    """

    def __init__(self, round_up=lambda size: size):
        super().__init__()
        self.round_up, self.now, self.peak, self.sizes = round_up, 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.enter(tensor.untyped_storage())
        # bitsandbytes dequantizes the weight inside of this operation where x has more
        # rows; for fewer a kernel reads the packed weight. Source:
        # bitsandbytes/backends/cuda/ops.py, _dequant_linear_fallback.
        if function is torch.ops.bitsandbytes.gemm_4bit.default:
            x, _, shape = args[:3]
            if x.numel() // x.shape[-1] > 1536:
                scratch = dequantized_bytes(shape, x.itemsize)
                self.peak = max(self.peak, self.now + scratch)
        return result

    def enter(self, storage):
        """Count a storage, from now until torch lets go of it."""
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = self.round_up(storage.nbytes())
        self.now += self.sizes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.leave, key)

    def leave(self, key):
        self.now -= self.sizes.pop(key)


def measure(trainer) -> dict[str, int]:
    """Let a trainer train, and return the bytes that its run took, by kind.

    The first kinds are those of state_bytes. `peak` is the most that its tensors held:
    on a GPU as torch's allocator counts, without other models; on a CPU as a Ledger
    counts. `passing` is the part of the peak that no kept kind holds. On a GPU,
    `reserved` is what torch took from the card.
    """
    device = env.profile().device
    tensors = (t for p in trainer.model.parameters() for t in stored_tensors(p))
    if device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()  # an earlier run's would count as others
        own = sum(in_blocks(tensor.nbytes) for tensor in tensors)
        others = max(0, torch.cuda.memory_allocated(device) - own)  # another model's
        with peak() as found:
            trainer.train()
        most = found["bytes"] - others
    else:
        ledger = Ledger()
        for tensor in tensors:
            ledger.enter(tensor.untyped_storage())
        with ledger:
            trainer.train()
        most = ledger.peak
    kinds = state_bytes(trainer.model, trainer.optimizer)
    held = sum(kinds.values()) - kinds["gradients"]
    kinds |= {"passing": most - held, "peak": most}
    if device.type == "cuda":
        kinds["reserved"] = torch.cuda.max_memory_reserved(device)
    return kinds
