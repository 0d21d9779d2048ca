"""What machine this is: device, dtypes, memory, versions, and where files are."""

import contextlib
import functools
import importlib.metadata
import numbers
import os
import pathlib
import tempfile
from typing import NamedTuple

import platformdirs
import psutil
import torch

GIB = 2**30
LARGEST_GIB = 1000  # no GPU has as much; a number like 8192 is in MB
ROOT = pathlib.Path(__file__).resolve().parents[2]  # the repository
UNGATED = "HuggingFaceTB/SmolLM2-1.7B-Instruct"  # a GPU needs a larger Llama
GATED = "meta-llama/Llama-3.1-8B"  # for a card with room, once Meta has granted access
GATED_GIB = 20  # of GPU memory
CGROUP = pathlib.Path("/sys/fs/cgroup")  # where Linux keeps a container's limits
TESTED = {
    "torch": ">=2.11,<2.14",
    "transformers": ">=5.13,<5.24",
    "peft": ">=0.19.1,<0.22",
    "trl": ">=0.29,<1.17",
    "bitsandbytes": ">=0.49,<0.51",
}


class Profile(NamedTuple):
    """How this machine trains: decided once, here, for the whole course."""

    kind: str  # "cpu", "fp16" (Turing: T4) or "bf16" (Ampere and later)
    device: torch.device
    compute_dtype: torch.dtype  # dtype that 4-bit weights are dequantized to
    optim: str  # optimizer name as TrainingArguments knows it
    fp16: bool  # mixed precision of the Trainer
    bf16: bool
    use_cpu: bool  # on a Mac the Trainer would take MPS, where nothing was tested
    checkpointing: bool  # recompute activations in the backward pass
    base: str  # the base model that fits; the variable QLORA_BASE names another


def profile() -> Profile:
    """The machine's profile; QLORA_PROFILE forces another one.

    Raises ValueError for an unknown kind, RuntimeError for a GPU's kind without CUDA.
    """
    kind, has_gpu = os.environ.get("QLORA_PROFILE"), torch.cuda.is_available()
    if not kind and has_gpu:
        # torch.cuda.is_bf16_supported() says True on a T4 too, which emulates bf16
        kind = "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    chosen = profile_of(kind or "cpu")
    if chosen.kind != "cpu" and not has_gpu:
        raise RuntimeError(
            f"profile {kind!r} needs an NVIDIA GPU, and torch sees none: unset "
            "QLORA_PROFILE, or choose a T4 under Colab's Runtime > Change runtime type"
        )
    if chosen.base == UNGATED and chosen.kind == "bf16":
        room = torch.cuda.get_device_properties(0).total_memory / GIB
        if room >= GATED_GIB and has_access(GATED):
            return chosen._replace(base=GATED)
    return chosen


@functools.cache
def has_access(name: str) -> bool:
    """Whether this user may fetch a gated model of the Hub, or has it already."""
    # here, because it imports tqdm.auto, which setup() must be ready for
    from huggingface_hub import HfApi, get_token, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return True
    if not get_token():
        return False
    try:
        HfApi().auth_check(name)
    except Exception:  # no grant, no network, or a token that has ended
        return False
    return True


def profile_of(kind: str) -> Profile:
    """The profile of a kind: "cpu", "fp16" or "bf16". Raises ValueError for others."""
    if kind not in ("cpu", "fp16", "bf16"):
        raise ValueError(f"profile {kind!r} is unknown: take 'cpu', 'fp16' or 'bf16'")
    gpu = kind != "cpu"
    # ATEN_CPU_CAPABILITY lowers the first answer and not the second
    native = "AVX512" in torch.backends.cpu.get_cpu_capability()
    native = native and torch.cpu._is_avx512_bf16_supported()
    if kind == "fp16":
        dtype = torch.float16
    elif gpu or native:
        dtype = torch.bfloat16
    else:  # a CPU that emulates bf16 takes six times as long
        dtype = torch.float32
    return Profile(
        kind=kind,
        device=torch.device("cuda", 0) if gpu else torch.device("cpu"),
        compute_dtype=dtype,
        optim="paged_adamw_8bit" if gpu else "adamw_torch",  # a CPU cannot page
        fp16=dtype == torch.float16,
        bf16=dtype == torch.bfloat16,
        # without a GPU transformers makes no settings in bf16 unless this is set
        use_cpu=not gpu or not torch.cuda.is_available(),
        checkpointing=gpu,  # on a CPU time is short, not memory
        base=os.environ.get("QLORA_BASE") or (UNGATED if gpu else "embedded"),
    )


def path(name: str) -> pathlib.Path:
    """A file or folder of the repository, by its path. Raises FileNotFoundError."""
    if not (ROOT / name).exists():
        raise FileNotFoundError(f"{name!r} is not in {ROOT}: clone all of the course")
    return ROOT / name


def cache_dir() -> pathlib.Path:
    """The folder for the converted model, which QLORA_CACHE moves. Raises OSError."""
    usual = platformdirs.user_cache_dir("qlora-cookbook", appauthor=False)
    folder = pathlib.Path(os.environ.get("QLORA_CACHE") or usual)
    try:
        folder = folder.expanduser().absolute()
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        if os.environ.get("QLORA_CACHE"):  # a process elsewhere has the same cache
            os.environ["QLORA_CACHE"] = str(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        raise OSError(
            f"the cache {folder} cannot be written ({error}): set QLORA_CACHE"
        ) from error
    return folder


def check_whole(name: str, value, low: int = 1, high: int | None = None) -> None:
    """Raise ValueError unless `value` is a whole number from `low` to `high`."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        limits = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} is {value!r}: give a whole number {limits}")


def check_name(name: str, value) -> None:
    """Raise ValueError unless `value` can name a folder in the cache."""
    plain = isinstance(value, str) and value not in ("", "..")
    plain = plain and pathlib.Path(value).name == value
    if not plain:
        raise ValueError(
            f"{name} is {value!r}: give the plain name of a folder, such as 'my_run'"
        )


def check_gib(name, gib) -> None:
    """Raise ValueError unless `gib` can be the memory of one GPU, in GiB."""
    number = isinstance(gib, numbers.Real) and not isinstance(gib, bool)
    if not number or not 0 < gib < LARGEST_GIB:
        raise ValueError(
            f"{name} is {gib!r}, expected the memory of one GPU in GiB, such as 15"
        )


def versions(names=tuple(TESTED)) -> dict[str, str]:
    """The installed version of each library, by its name; "missing" where it is not."""
    found = dict.fromkeys(names, "missing")
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def total_ram_gib() -> float:
    """GiB of memory that this process may use: the machine's, or its container's."""
    limits = [psutil.virtual_memory().total]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no limit, or it is "max"
            limits.append(int((CGROUP / name).read_text("utf-8")))
    return min(limits) / GIB
