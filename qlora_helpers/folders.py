"""Folders that are written whole and replace only what this package wrote.

Each folder holds a note, a JSON file that lists the other files with a fingerprint.
A file that the note does not list, or whose fingerprint differs, is somebody's work.
"""

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import psutil

from qlora_helpers.card import CARD, is_own_card
from qlora_helpers.model_files import sha256

# What a person or a tool may put beside our files: it is kept when they are replaced.
KEPT = (CARD, ".gitattributes", ".ipynb_checkpoints", ".DS_Store")


def check_out(out, note: str, inputs: dict) -> Path:
    """Check that the folder `out` may be written, and return its resolved path.

    note: the name of its note. inputs: the folders that are read, by what they are
    ("the base"). A folder that exists must be empty or hold only what its note lists.

    Raises FileExistsError or PermissionError if it may not, and ValueError for no name.
    """
    if not str(out):
        raise ValueError("the folder's name is empty: name a folder")
    place = Path(out).expanduser().resolve()
    for what, folder in inputs.items():
        given = Path(folder).resolve()
        if place == given or place in given.parents or given in place.parents:
            where = "is" if place == given else "holds or lies in the folder of"
            raise FileExistsError(f"{out} {where} {what}: name another folder")
    if os.path.ismount(place) or place == Path.cwd():
        raise FileExistsError(
            f"{out} is a disk or the current folder: name a folder inside it"
        )
    if place.exists() and not place.is_dir():
        raise FileExistsError(f"{out} is a file: name a folder that does not exist yet")
    if strange := _foreign(place, note):
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise FileExistsError(
            f"{out} holds {strange[0]}{more}, which its {note} does not list or which "
            "was changed since, and which would be lost: name another folder"
        )
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place.parent).close()
    except OSError as error:
        raise PermissionError(
            f"{out} cannot be written ({error.strerror}): name a folder elsewhere"
        ) from None
    return place


@contextlib.contextmanager
def written_whole(out, note: str, facts: dict, inputs: dict):
    """Yield an empty folder to fill, then move it to `out` with its note.

    If filling it fails, nothing is left and an older folder stays. What a process left
    that was killed meanwhile is put right by the next call for the same `out`.
    facts: what the note says besides the list of files. What KEPT names moves from the
    older folder, except an unchanged card of this package. Raises what `check_out`
    raises.
    """
    place = check_out(out, note, inputs)
    hidden = f".{place.name}."
    for left in list(place.parent.iterdir()):
        name, _, process = left.name.rpartition(".")[0].rpartition(".")
        ours = name + "." == hidden and process.isdigit()
        if ours and not psutil.pid_exists(int(process)):  # it was killed
            _put_right(left, place)
    prefix = f"{hidden}{os.getpid()}."
    beside = Path(tempfile.mkdtemp(prefix=prefix, dir=place.parent))
    made, old = beside / "made", beside / "old"
    try:
        made.mkdir()
        yield made
        for kept in (place / name for name in KEPT):
            if kept.is_dir():
                shutil.copytree(kept, made / kept.name, dirs_exist_ok=True)
            elif kept.exists() and not (kept.name == CARD and is_own_card(kept)):
                shutil.copyfile(kept, made / kept.name)
        listed = {}
        for file in sorted(made.rglob("*")):
            if file.is_file():
                listed[file.relative_to(made).as_posix()] = fingerprint(file)
        text = json.dumps(facts | {"files": listed}, indent=1, default=str)
        (made / note).write_text(text + "\n", encoding="utf-8")
        for file in made.rglob("*.safetensors"):  # safetensors makes them private
            file.chmod((made / note).stat().st_mode)
        check_out(out, note, inputs)  # again, since minutes may have passed
        if place.exists():
            place.replace(old)
            if strange := _foreign(old, note):  # it came in this very moment
                raise FileExistsError(f"{strange[0]} was just written to {out}")
        made.replace(place)
    except OSError as error:
        if place.exists() and old.exists():
            raise FileExistsError(
                f"another process wrote to {out} ({error}): what was there is in {old}"
            ) from None
        raise
    finally:  # also after an interrupt
        _put_right(beside, place)


def _put_right(beside: Path, place: Path) -> None:
    """Put an older folder back to `place`, and remove the hidden folder beside it."""
    made, old = beside / "made", beside / "old"
    if old.exists() and not place.exists():
        old.replace(place)
    if not (old.exists() and made.exists()):  # else `old` is the only copy
        shutil.rmtree(beside, ignore_errors=True)


_seen = {}  # hashes of files by their size and date, since weights take seconds


def fingerprint(file) -> str:
    """A file's SHA-256, which is computed again only if the file may have changed."""
    stat = os.stat(file)
    key = stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
    if key not in _seen:
        _seen[key] = sha256(file)
    return _seen[key]


def _foreign(place: Path, note: str) -> list[str]:
    """The files and empty folders that a note does not list, or that changed since."""
    try:
        listed = dict(json.loads((place / note).read_text("utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        listed = {}
    strange = []
    for file in sorted(place.rglob("*")):
        name = file.relative_to(place).as_posix()
        if file.is_dir() and not file.is_symlink():
            own = any(file.iterdir())
        elif name == note:
            own = bool(listed)
        else:
            own = name in listed and listed[name] == fingerprint(file)
        if not own and name.split("/")[0] not in KEPT:
            strange.append(name)
    return strange
