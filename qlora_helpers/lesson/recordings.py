"""Read and write data/measured: what was measured on machines a reader may lack."""

import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys

import torch

from qlora_helpers import env

FOLDER = env.ROOT / "data" / "measured"
FACTS = ("date", "gpu", "driver", "versions", "command", "commit")


def read(name, folder=FOLDER) -> dict:
    """The recording `name`: {"facts": {...}, "rows": [{...}, ...]}.

    Units are in the rows' field names (`peak_gib`, `tokens_per_second`).

    Raises FileNotFoundError for an unknown name, ValueError for a broken recording.
    """
    file = pathlib.Path(folder) / f"{name}.json"
    if not file.exists():
        known = sorted(path.stem for path in pathlib.Path(folder).glob("*.json"))
        raise FileNotFoundError(
            f"no recording {name!r} in data/measured; there are: "
            f"{', '.join(known) or 'none yet'}"
        )
    try:
        recording = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"data/measured/{file.name} is not JSON ({error}): restore it from git"
        ) from error
    _check(name, recording)
    return recording


def write(name, facts, rows, folder=FOLDER) -> pathlib.Path:
    """Write a benchmark's rows with the facts of their measuring; the file's path.

    The file is replaced as a whole: a reader sees the old one or the new one.

    Raises ValueError for missing facts, or rows that are not a list of dicts.
    """
    recording = {"facts": facts, "rows": rows}
    _check(name, recording)
    file = pathlib.Path(folder) / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(recording, indent=1, ensure_ascii=False, allow_nan=False)
    beside = file.with_name(f"{file.name}.{os.getpid()}.part")
    beside.write_text(text + "\n", encoding="utf-8")
    beside.replace(file)
    return file


def facts() -> dict:
    """What a recording says of its making, on this machine and now.

    `gpu` names the CPU where there is no GPU. Where git is not at hand, the environment
    variable QLORA_COMMIT gives the commit.
    """
    cuda = torch.cuda.is_available()
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
        "command": " ".join(["python", *arguments]),
        "commit": os.environ.get("QLORA_COMMIT") or _commit(),
    }


def _check(name, recording) -> None:
    where = f"recording {name!r}"
    if not isinstance(recording, dict) or set(recording) != {"facts", "rows"}:
        raise ValueError(f'{where}: expected {{"facts": {{...}}, "rows": [...]}}')
    given, rows = recording["facts"], recording["rows"]
    missing = [
        key for key in FACTS if not isinstance(given, dict) or not given.get(key)
    ]
    if missing:
        raise ValueError(
            f"{where}: facts lack {', '.join(missing)}: take them from recorded.facts()"
        )
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{where}: rows must be a list of dicts, one per measurement")


def _output(command) -> str:
    """What a command prints, or "" where it is missing or fails."""
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
