"""Folders that are written whole, and that replace only what was written here.

Each folder holds a note, a JSON file that lists the others with their fingerprints.
What the note does not list, or lists otherwise, is somebody else's work.
"""

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from .card import CARD, is_own_card
from .embedded import sha256


def check_out(out, note: str, inputs: dict) -> Path:
    """The place of the folder `out`, once it is known that it may be written.

    note: the name of its note. inputs: folders that are read, by what they are ("the
    base"). A folder that is there must be empty, or hold only what its note lists.

    Raises FileExistsError or PermissionError, in a sentence, where it may not.
    """
    place = Path(out).expanduser().resolve()
    for what, folder in inputs.items():
        if place == Path(folder).resolve():
            raise FileExistsError(f"{out} is {what}: name another folder")
    if os.path.ismount(place) or place == Path.cwd():
        raise FileExistsError(
            f"{out} is a disk or the current folder, which cannot be replaced: name a "
            "folder inside it"
        )
    if place.exists() and not place.is_dir():
        raise FileExistsError(f"{out} is a file: name a folder that is not there yet")
    if strange := _foreign(place, note):
        more = f" and {len(strange) - 1} more" if strange[1:] else ""
        raise FileExistsError(
            f"{out} holds {strange[0]}{more}, which was not written here, or was "
            "changed since, and would be lost: name another folder"
        )
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place.parent).close()
    except OSError as error:
        raise PermissionError(
            f"{out} cannot be written ({error.strerror}): name a folder that can"
        ) from None
    return place


@contextlib.contextmanager
def written_whole(out, note: str, facts: dict, inputs: dict):
    """Yield an empty folder to fill; then it stands at `out`, with its note.

    Nothing is left where filling it fails, and an older folder is replaced only then.
    facts: what the note says beside the list of files. A README.md of the older folder
    is kept, unless it is an unchanged card of ours. Raises what `check_out` raises,
    before anything is filled.
    """
    place = check_out(out, note, inputs)
    hidden = {"dir": place.parent, "prefix": f".{place.name}."}
    with tempfile.TemporaryDirectory(**hidden) as beside:
        made, old = Path(beside) / "made", Path(beside) / "old"
        made.mkdir()
        yield made
        card = place / CARD  # a person may write it: it outlives what it describes
        if card.exists() and not is_own_card(card):
            shutil.copyfile(card, made / CARD)
        listed = {file.name: fingerprint(file) for file in sorted(made.iterdir())}
        text = json.dumps(facts | {"files": listed}, indent=1, default=str)
        (made / note).write_text(text + "\n", encoding="utf-8")
        check_out(out, note, inputs)  # minutes may have passed
        if place.exists():
            place.replace(old)
        try:
            made.replace(place)
        except OSError:
            if old.exists():
                old.replace(place)
            raise


def fingerprint(file) -> str | int:
    """What tells that a file was changed: its hash; of large weights their size."""
    file = Path(file)
    return file.stat().st_size if file.suffix == ".safetensors" else sha256(file)


def _foreign(place: Path, note: str) -> list[str]:
    """The files of a folder that its note does not list as they are."""
    if not place.is_dir():
        return []
    try:
        listed = json.loads((place / note).read_text("utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        listed = {}
    return [
        file.name
        for file in sorted(place.iterdir())
        if file.name != CARD
        and not (file.name == note and listed)
        and not (file.is_file() and listed.get(file.name) == fingerprint(file))
    ]
