"""Records from a file (JSONL or CSV) or from a data set of the Hub."""

import csv
import io
import json
import re
from pathlib import Path

from datasets import Dataset, load_dataset

ON_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+")  # OWNER/NAME
OTHER_FILES = (".json", ".tsv", ".txt", ".parquet", ".xlsx")  # refused by their names


def read(path) -> list[dict] | Dataset:
    """The records of a `.jsonl` file, of a `.csv` file, or of a data set of the Hub.

    A `.jsonl` file has one JSON object a line. Every field of a CSV file is text, an
    empty one empty text. Empty lines are skipped. A data set is named OWNER/NAME; its
    split "train" is returned.

    Raises FileNotFoundError, and ValueError, naming file and line, for another kind of
    file, a broken line, text that is not UTF-8, or a file without rows.
    """
    if not str(path):
        raise ValueError("the path is empty: give that of a .jsonl or .csv file")
    name, path = str(path), Path(path).expanduser()
    readers = {".jsonl": _jsonl, ".csv": _csv}
    is_file = path.exists() or path.suffix.lower() in (*readers, *OTHER_FILES)
    if not is_file and ON_THE_HUB.fullmatch(name):
        return _from_hub(name)
    if path.suffix.lower() not in readers:
        raise ValueError(
            f"{path} ends in {path.suffix!r}: give a .jsonl file, with one JSON object "
            "on each line, or a .csv file"
        )
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: give the path of your data")
    try:
        found = readers[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start}): save it "
            "again as UTF-8"
        ) from None
    if not found:
        raise ValueError(f"{path} holds no rows: give a file with at least one record")
    return found


def _from_hub(name: str) -> Dataset:
    try:
        return load_dataset(name, split="train")
    except (OSError, ValueError) as error:  # unknown, private, or no connection
        raise FileNotFoundError(
            f"{name!r} is no file here, and the Hub gave no data set of this name "
            f"({str(error).strip().splitlines()[0]}): give the path of a .jsonl or "
            ".csv file, or OWNER/NAME"
        ) from None


def _jsonl(path: Path) -> list[dict]:
    found = []
    for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, object_pairs_hook=_once)
        except json.JSONDecodeError as error:
            why = f"{error.msg} at column {error.colno}"
        except (RecursionError, ValueError) as error:  # too deep; a key twice
            why = str(error)
        else:
            if isinstance(record, dict):
                found.append(record)
                continue
            why = f"it is a {type(record).__name__}"
        raise ValueError(
            f"{path}, line {number}, is not a JSON object ({why}): write one whole "
            'object on each line, such as {"instruction": …, "output": …}'
        )
    return found


def _once(pairs: list[tuple]) -> dict:
    """The object of these keys and values; json would keep the last of equal keys."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key occurs twice: {', '.join(key for key, _ in pairs)}")
    return found


def _csv(path: Path) -> list[dict]:
    csv.field_size_limit(2**31 - 1)  # the usual one is 128 KiB
    # pandas lets a quote that is closed lines later swallow those lines
    text = io.StringIO(path.read_text("utf-8-sig"), newline="")
    lines = csv.reader(text, strict=True)
    found, names = [], []
    try:
        for fields in filter(None, lines):
            names = names or fields
            if len(fields) != len(names):
                raise csv.Error(f"{len(fields)} fields, and {len(names)} names")
            found.append(dict(zip(names, fields, strict=True)))
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {lines.line_num}, is not CSV ({error}): give each line as "
            'many fields as the first, and put a field with commas into "quotes"'
        ) from None
    if len(set(names)) < len(names):
        raise ValueError(f"{path} has the columns {names}: give each its own name")
    return found[1:]
