"""What machine is this: device, bf16, memory, versions; a notebook's first cell."""

import ctypes
import importlib.metadata
import logging
import numbers
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from typing import NamedTuple

try:
    import platformdirs
    import psutil
    import torch
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error.name} is missing in the Python of this kernel, {sys.executable}: "
        "choose the kernel of the course's .venv, or install requirements.txt in "
        "this Python",
        name=error.name,
    ) from error

GIB = 2**30
LARGEST_GIB = 1000  # no GPU has as much; a number like 8192 is in MB
ROOT = pathlib.Path(__file__).resolve().parents[1]  # the repository
UNGATED = "HuggingFaceTB/SmolLM2-1.7B-Instruct"  # a GPU needs a larger Llama
CGROUP = pathlib.Path("/sys/fs/cgroup")  # where Linux keeps a container's limits

LEAST_RAM_GIB = 6  # the course takes at most 4; the rest is the system and a browser
LEAST_DISK_GIB = 2  # wheel, GGUF and converted weights while the first one is made
# (first, past the last) version that the tests have seen working
TESTED = {
    "torch": ("2.11", "2.14"),
    "transformers": ("5.13", "5.24"),
    "peft": ("0.19.1", "0.22"),
    "trl": ("0.29", "1.17"),
    "bitsandbytes": ("0.49", "0.51"),
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
    base: str  # the base model that fits; QLORA_BASE names another


def cpu_has_bf16() -> bool:
    """True where this CPU multiplies bf16 natively; emulated it is six times slower.

    Two questions, since each can say yes alone: ATEN_CPU_CAPABILITY lowers the first
    and not the second.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    return "AVX512" in capability and torch.cpu._is_avx512_bf16_supported()


def profile(force: str | None = None) -> Profile:
    """The machine's profile: one of "cpu", "fp16" and "bf16".

    A GPU below compute capability 8.0 gets fp16: `torch.cuda.is_bf16_supported()` is no
    test, it says True on a T4, by emulation. `force`, or else the environment variable
    QLORA_PROFILE, overrides the choice, so that a T4's path runs on any GPU.

    Raises ValueError for an unknown kind, RuntimeError for a GPU's kind without CUDA.
    """
    kind = force or os.environ.get("QLORA_PROFILE")
    has_gpu = torch.cuda.is_available()
    if not kind:
        kind = "cpu"
        if has_gpu:
            kind = "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    chosen = _of_kind(kind)
    if kind != "cpu" and not has_gpu:
        raise RuntimeError(
            f"profile {kind!r} needs an NVIDIA GPU and torch sees none: unset "
            "QLORA_PROFILE, or on Colab choose Runtime > Change runtime type > T4 GPU"
        )
    return chosen


def profile_of(kind: str) -> Profile:
    """The profile of another machine, to plan a run with: nothing can run on it here.

    Where this machine has no GPU, `use_cpu` is set: else transformers makes no settings
    in bf16. Raises ValueError for an unknown kind.
    """
    planned = _of_kind(kind)
    return planned._replace(use_cpu=not torch.cuda.is_available())


def _of_kind(kind: str) -> Profile:
    if kind not in ("cpu", "fp16", "bf16"):
        raise ValueError(f"profile {kind!r} is unknown: take 'cpu', 'fp16' or 'bf16'")
    gpu = kind != "cpu"
    if gpu:
        dtype = torch.float16 if kind == "fp16" else torch.bfloat16
    else:
        dtype = torch.bfloat16 if cpu_has_bf16() else torch.float32
    return Profile(
        kind=kind,
        device=torch.device("cuda", 0) if gpu else torch.device("cpu"),
        compute_dtype=dtype,
        optim="paged_adamw_8bit" if gpu else "adamw_torch",  # a CPU cannot page
        fp16=dtype == torch.float16,
        bf16=dtype == torch.bfloat16,
        use_cpu=not gpu,
        checkpointing=gpu,  # on a CPU time is short, not memory
        base=os.environ.get("QLORA_BASE") or (UNGATED if gpu else "embedded"),
    )


def path(name: str) -> pathlib.Path:
    """The file or folder `name` of the repository, e.g. path("data/night_trains").

    Raises FileNotFoundError, saying where it looked.
    """
    found = ROOT / name
    if not found.exists():
        raise FileNotFoundError(
            f"{name!r} is not in {ROOT}: clone the repository as a whole, a notebook "
            "alone is not enough"
        )
    return found


def cache_dir() -> pathlib.Path:
    """The folder for the converted model: the platform's cache, or QLORA_CACHE."""
    usual = platformdirs.user_cache_dir("qlora-cookbook", appauthor=False)
    folder = pathlib.Path(os.environ.get("QLORA_CACHE") or usual)
    try:
        folder = folder.expanduser().absolute()
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        raise OSError(
            f"the cache {folder} cannot be written ({error}): "
            "set QLORA_CACHE to a folder that can"
        ) from error
    return folder


def check_whole(name: str, value) -> None:
    """Raise ValueError unless `value` is a whole number from 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}: give a whole number of at least 1")


def check_gib(name, gib) -> None:
    """Raise ValueError unless `gib` can be the memory of one GPU, in GiB."""
    number = isinstance(gib, numbers.Real) and not isinstance(gib, bool)
    if not number or not 0 < gib < LARGEST_GIB:
        raise ValueError(
            f"{name} is {gib!r}, expected the memory of one GPU in GiB: give a number "
            f"above 0 and below {LARGEST_GIB}, such as 15 for a T4"
        )


def version_tuple(text: str) -> tuple[int, ...]:
    """(2, 13, 0) for "2.13.0+cpu": the leading numbers, enough to compare releases."""
    numbers = []
    for part in text.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def versions(names=tuple(TESTED)) -> dict[str, str]:
    """The installed version of each library, by its name; "missing" where it is not."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def total_ram_gib() -> float:
    """GiB of memory that this process may use: the machine's, or its container's."""
    limits = [psutil.virtual_memory().total]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (CGROUP / name).read_text("utf-8").strip()
        except OSError:  # the limit does not exist or must not be read
            continue
        if text.isdigit():
            limits.append(int(text))
    return min(limits) / GIB


def check_machine() -> list[str]:
    """Every reason why the course cannot work here, each with its repair."""
    faults = []
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        faults.append(
            f"Python {sys.version.split()[0]}: 3.11 to 3.13 is needed; "
            "make the virtual environment with one of these"
        )
    if (ram := total_ram_gib()) < LEAST_RAM_GIB:
        faults.append(
            f"{ram:.1f} GiB of memory, {LEAST_RAM_GIB} are needed: "
            "take a larger machine, or Colab"
        )
    try:
        free = shutil.disk_usage(cache_dir()).free / GIB
        if free < LEAST_DISK_GIB:
            faults.append(
                f"{free:.1f} GiB of disk free under {cache_dir()}, {LEAST_DISK_GIB} "
                "are needed: make room, or set QLORA_CACHE to another disk"
            )
    except OSError as error:
        faults.append(str(error))
    faults += [
        f"{name} is missing: pip install -r requirements.txt"
        for name, version in versions().items()
        if version == "missing"
    ]
    return faults


def untested() -> list[str]:
    """The libraries whose version lies outside the range that the tests have seen."""
    lines = []
    for name, version in versions().items():
        first, last = TESTED[name]
        inside = version_tuple(first) <= version_tuple(version) < version_tuple(last)
        if version != "missing" and not inside:
            lines.append(f"{name} {version} (tested: from {first} to below {last})")
    return lines


SERVING = {"openai": ("2", "4"), "xllamacpp": ("2026.4", "2027")}  # of 07


def install_on_colab() -> None:
    """On Colab or Kaggle, add what is missing and remove what breaks PEFT.

    Does nothing on other machines. Raises RuntimeError if pip fails.
    """
    # Kaggle's image is built from Colab's, so both are told by what only they set.
    if "google.colab" not in sys.modules and "KAGGLE_KERNEL_RUN_TYPE" not in os.environ:
        return
    needed = TESTED | {"gguf": ("0.17", "1")} | SERVING
    found = versions((*needed, "datasets", "torchao"))
    missing = [
        f"{name}>={first},<{last}"
        for name, (first, last) in needed.items()
        if found[name] == "missing"
    ]
    if missing:
        # The newest TRL would replace datasets, and with it the pyarrow that the
        # kernel has loaded: what is there stays, and pip takes a TRL that suits it.
        if found["datasets"] != "missing":
            missing.append(f"datasets=={found['datasets']}")
        _pip("install", "-q", *missing)
    if found["torchao"] != "missing":  # PEFT >= 0.19 refuses Colab's torchao 0.10
        _pip("uninstall", "-q", "-y", "torchao")
    importlib.invalidate_caches()


def _pip(*arguments) -> None:
    try:
        subprocess.check_call([sys.executable, "-m", "pip", *arguments])
    except subprocess.CalledProcessError as error:
        raise RuntimeError(
            f"pip {' '.join(arguments)} failed: turn on the internet (on Kaggle in the "
            "notebook's settings), then run this cell again"
        ) from error


def quiet() -> None:
    """Keep the libraries' chatter, telemetry and fork warnings out of the lesson."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch.profiler's "USDT: ..."
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # "pip install kernels"
    # TRL and PEFT pass names that transformers 5.23 renames: theirs to mend, not ours
    theirs = r"(trl|transformers)\b"
    warnings.filterwarnings("ignore", category=FutureWarning, module=theirs)
    # Without ipywidgets tqdm draws its bars as text, which is enough.
    warnings.filterwarnings("ignore", message="IProgress not found")


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next tensor; True where it now does.

    Left alone it hands every tensor above 32 MB back to the system and asks for it
    again, zeroed, page by page, which slows training on a CPU.
    Source: `man mallopt`.
    """
    return _mallopt({MMAP_THRESHOLD: GIB, TRIM_THRESHOLD: GIB})


def return_freed_memory() -> bool:
    """Let glibc hand a tensor's memory back once it is freed; True where it now does.

    Left alone it keeps tensors of up to 32 MB in a heap that grows with their mixture:
    about twice what a merge by small shards holds. Source: `man mallopt`.
    """
    return _mallopt({MMAP_THRESHOLD: 2**20})


MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # names of malloc.h


def _mallopt(options) -> bool:
    # libc_ver() opens Python's own file, which the Windows Store's Python forbids
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(name, value) for name, value in options.items())


def describe(chosen: Profile) -> str:
    """One line: Python, torch, device and its memory, compute dtype."""
    if chosen.use_cpu:
        where = f"CPU, {os.cpu_count()} cores, {total_ram_gib():.0f} GiB"
    else:
        gpu = torch.cuda.get_device_properties(chosen.device)
        where = f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB"
    dtype = str(chosen.compute_dtype).removeprefix("torch.")
    python = ".".join(map(str, sys.version_info[:2]))
    return f"Python {python}, torch {torch.__version__}, {where}, computes in {dtype}"


def show_one_gpu() -> int:
    """Let this process see only the first of several GPUs; return how many it hid.

    The Trainer spreads a batch over every GPU that its process sees. TRL 1.16 refuses
    that; an older TRL takes more rows per step than the settings say. Nothing changes
    if a choice was made: CUDA_VISIBLE_DEVICES is set, or LOCAL_RANK, with which
    torchrun and accelerate give a process its GPU.
    """
    if {"CUDA_VISIBLE_DEVICES", "LOCAL_RANK"} & os.environ.keys():
        return 0
    # Until CUDA starts, torch counts with NVML. Without NVML it starts CUDA to count,
    # and then the variable is set too late; about_gpus notices that.
    count = torch.cuda.device_count()
    if count > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = "0"  # children inherit it
    return max(count - 1, 0)


def about_gpus(hidden: int) -> str:
    """What a reader with several GPUs needs to know; "" with one GPU or none.

    Call it after CUDA has started. `hidden` is what show_one_gpu() returned.
    """
    choose = (
        "restart the kernel and run "
        """`import os; os.environ["CUDA_VISIBLE_DEVICES"] = "{}"` before this cell"""
    )
    seen = torch.cuda.device_count()
    if seen > 1 and "LOCAL_RANK" not in os.environ:
        if hidden:  # CUDA had started before the variable was set
            del os.environ["CUDA_VISIBLE_DEVICES"]
        return (
            f"This kernel sees {seen} GPUs, but training takes only one: "
            f"{choose.format(0)}."
        )
    if hidden:
        return (
            f"This kernel uses the first of {hidden + 1} GPUs; to use another, "
            f"{choose.format(1)}."
        )
    return ""


def try_gpu(device: torch.device) -> None:
    """Compute one sum on `device`: some builds of torch lack kernels for an old GPU.

    Raises RuntimeError, naming the GPU, if that fails.
    """
    try:
        torch.ones(1, device=device).add(1).item()
    except RuntimeError as error:
        raise RuntimeError(
            f"torch {torch.__version__} cannot compute on the "
            f"{torch.cuda.get_device_name(device)} ({str(error).splitlines()[0]}): "
            "choose another GPU, such as a T4, or set QLORA_PROFILE=cpu"
        ) from error


def setup() -> None:
    """Make the machine ready, refuse only what cannot work, and say what was found.

    Raises RuntimeError naming every fault and its repair.
    """
    hidden = show_one_gpu()  # must run before anything starts CUDA
    quiet()
    keep_freed_memory()
    install_on_colab()
    if faults := check_machine():
        raise RuntimeError("this machine is not ready:\n- " + "\n- ".join(faults))
    for line in untested():
        warnings.warn(f"not tested with {line}", stacklevel=2)
    chosen = profile()
    if not chosen.use_cpu:
        try_gpu(chosen.device)
        if line := about_gpus(hidden):
            print(line)
    print("ready:", describe(chosen))
