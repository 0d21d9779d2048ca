"""Folders that are written whole and replace only what this package wrote.

Each folder holds a note, a JSON file that lists the other files with a fingerprint.
A file that the note does not list, or whose fingerprint differs, is somebody's work.
What people and tools usually put beside such files (KEPT) is kept instead.
"""

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from qlora_helpers.card import CARD, is_own_card
from qlora_helpers.models.embedded import sha256

# What a person or a tool may put beside our files: it is kept when they are replaced.
KEPT = (CARD, ".gitattributes", ".ipynb_checkpoints", ".DS_Store")


def check_out(out, note: str, inputs: dict) -> Path:
    """Check that the folder `out` may be written, and return its resolved path.

    note: the name of its note. inputs: the folders that are read, by what they are
    ("the base"). A folder that exists must be empty or hold only what its note lists.

    Raises FileExistsError or PermissionError, in a sentence, if it may not.
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
        raise FileExistsError(f"{out} is a file: name a folder that does not exist yet")
    if strange := _foreign(place, note):
        more = f" and {len(strange) - 1} more" if strange[1:] else ""
        raise FileExistsError(
            f"{out} holds {strange[0]}{more}, which its {note} does not list as "
            "written by this package or which was changed since, and which would be "
            "lost: name another folder"
        )
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place.parent).close()
    except OSError as error:
        raise PermissionError(
            f"{out} cannot be written ({error.strerror}): name a folder that you may "
            "write"
        ) from None
    return place


@contextlib.contextmanager
def written_whole(out, note: str, facts: dict, inputs: dict):
    """Yield an empty folder to fill, then move it to `out` with its note.

    If filling it fails, nothing is left and an older folder stays. facts: what the note
    says besides the list of files. The older folder's README.md is kept unless it is an
    unchanged card of this package. Raises what `check_out` raises, before anything is
    filled.
    """
    place = check_out(out, note, inputs)
    beside = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    made, old = beside / "made", beside / "old"
    try:
        made.mkdir()
        yield made
        for name in filter(lambda name: (place / name).exists(), KEPT):
            if name != CARD or not is_own_card(place / name):
                _copy(place / name, made / name)
        listed = {file: fingerprint(made / file) for file in files_in(made)}
        text = json.dumps(facts | {"files": listed}, indent=1, default=str)
        (made / note).write_text(text + "\n", encoding="utf-8")
        check_out(out, note, inputs)  # again, since minutes may have passed
        if place.exists():
            place.replace(old)
            if strange := _foreign(old, note):  # it came in this very moment
                raise FileExistsError(f"{strange[0]} was just written to {out}")
        made.replace(place)
    except OSError as error:
        if place.exists() and old.exists():
            raise FileExistsError(
                f"another process wrote to {out} ({error}): what was there before is "
                f"in {old}, and nothing of it is lost"
            ) from None
        raise
    finally:  # also after an interrupt
        if old.exists() and not place.exists():
            old.replace(place)
        if not (old.exists() and made.exists()):
            shutil.rmtree(beside, ignore_errors=True)


def files_in(folder: Path) -> list[str]:
    """The paths of all files below a folder, relative to it, sorted."""
    found = (f for f in folder.rglob("*") if f.is_symlink() or not f.is_dir())
    return sorted(file.relative_to(folder).as_posix() for file in found)


_seen = {}  # hashes of files that have not changed since: weights take seconds


def fingerprint(file) -> str:
    """The value that shows whether a file changed: its SHA-256."""
    stat = os.stat(file)
    key = stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
    if key not in _seen:
        _seen[key] = sha256(file)
    return _seen[key]


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copyfile(source, target)


def _foreign(place: Path, note: str) -> list[str]:
    """The files of a folder that its note does not list or that changed since."""
    if not place.is_dir():
        return []
    try:
        listed = dict(json.loads((place / note).read_text("utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        listed = {}
    known = {note, *listed} if listed else set()

    def changed(name):
        if name.split("/")[0] in KEPT or (name in known and name == note):
            return False
        return name not in known or listed[name] != fingerprint(place / name)

    strange = list(filter(changed, files_in(place)))
    folders = (file for file in place.rglob("*") if file.is_dir())
    empty = (f.relative_to(place) for f in folders if not any(f.iterdir()))
    return sorted(strange + [f.as_posix() for f in empty if f.parts[0] not in KEPT])
