"""Read data/measured: what was measured on machines that a reader may lack."""

from qlora_helpers import env
from qlora_helpers.model_files import read_json

FOLDER = env.ROOT / "data" / "measured"
FACTS = ("date", "gpu", "driver", "versions", "command", "commit")


def read(name, folder=FOLDER) -> dict:
    """The recording `name`: {"facts": {...}, "rows": [{...}, ...]}.

    Units are in the rows' field names (`peak_gib`, `tokens_per_second`).

    Raises FileNotFoundError for an unknown name, ValueError for a broken recording.
    """
    file = folder / f"{name}.json"
    if not file.exists():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.json")))
        raise FileNotFoundError(
            f"no recording {name!r} in {folder}; there are: {known}"
        )
    recording = read_json(file, "facts")
    check(name, recording)
    return recording


def check(name, recording) -> None:
    """Raise ValueError if the recording `name` lacks facts, or rows that are dicts."""
    facts, rows = recording["facts"], recording.get("rows")
    given = facts if isinstance(facts, dict) else {}
    missing = [fact for fact in FACTS if not given.get(fact)]
    if missing:
        raise ValueError(
            f"recording {name!r}: facts lack {', '.join(missing)}: "
            "take them from tools.recorder.facts()"
        )
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"recording {name!r}: rows must be a list of dicts")
