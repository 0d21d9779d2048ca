"""Write recordings: the files of data/measured, which lesson/recordings.py reads."""

import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys

import torch

from qlora_helpers import env
from qlora_helpers.lesson import recordings
from qlora_helpers.model_files import write_whole

# these hold torch, oneDNN and MKL to older instructions, or the course to a profile
HELD_BY = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
    "QLORA_PROFILE",
)


def write(name, facts, rows, folder=recordings.FOLDER) -> pathlib.Path:
    """Write a benchmark's rows with the facts of their measuring; return the path.

    The file is replaced as a whole: a reader sees the old one or the new one.

    Raises ValueError for missing facts, or rows that are not a list of dicts.
    """
    recording = {"facts": facts, "rows": rows}
    recordings.check(name, recording)
    file = pathlib.Path(folder) / f"{name}.json"
    text = json.dumps(recording, indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(file, text)
    return file


def facts() -> dict:
    """Return what a recording says about its making, on this machine and now.

    `gpu` names the CPU where there is no GPU. `command` begins with the variables of
    HELD_BY that are set. Where git is not at hand, the environment variable
    QLORA_COMMIT gives the commit.
    """
    cuda = torch.cuda.is_available()
    held = [f"{name}={os.environ[name]}" for name in HELD_BY if name in os.environ]
    arguments = [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]
    return {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name() if cuda else f"none, CPU: {_cpu_name()}",
        "driver": _driver() if cuda else "none",
        "versions": {
            "python": platform.python_version(),
            "cuda": torch.version.cuda or "none",
            **env.versions(),
        },
        "command": " ".join([*held, "python", *arguments]),
        "commit": os.environ.get("QLORA_COMMIT") or _commit(),
    }


def _output(command) -> str:
    """Return what a command prints, or "" where it is missing or fails."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=env.ROOT,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _commit() -> str:
    commit = _output(["git", "rev-parse", "--short=12", "HEAD"])
    changed = commit and _output(["git", "status", "--porcelain", "-uno"])
    return f"{commit} with changes" if changed else commit or "unknown"


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return (_output(query).splitlines() or ["unknown"])[0]


def _cpu_name() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
