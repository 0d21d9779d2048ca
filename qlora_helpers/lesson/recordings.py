"""Read data/measured: what was measured on machines that a reader may lack."""

import json
import pathlib

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
    check(name, recording)
    return recording


def check(name, recording) -> None:
    """Check the form of the recording `name`; `read` and tools.recorder call this.

    Raises ValueError for missing facts, or rows that are not a list of dicts.
    """
    where = f"recording {name!r}"
    if not isinstance(recording, dict) or set(recording) != {"facts", "rows"}:
        raise ValueError(f'{where}: expected {{"facts": {{...}}, "rows": [...]}}')
    given, rows = recording["facts"], recording["rows"]
    missing = [
        key for key in FACTS if not isinstance(given, dict) or not given.get(key)
    ]
    if missing:
        raise ValueError(
            f"{where}: facts lack {', '.join(missing)}: "
            "take them from tools.recorder.facts()"
        )
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{where}: rows must be a list of dicts, one per measurement")
