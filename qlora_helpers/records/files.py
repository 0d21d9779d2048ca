"""Records from a file: JSONL or CSV."""

import csv
import io
import json
from pathlib import Path

import pandas


def read(path) -> list[dict]:
    """The records of a `.jsonl` file (one JSON object a line) or of a `.csv` file.

    Every field of a CSV file is text, an empty one empty text. Empty lines are skipped.
    Raises FileNotFoundError, and ValueError, naming file and line, for another kind of
    file, a broken line, text that is not UTF-8, or a file without rows.
    """
    path = Path(path).expanduser()
    readers = {".jsonl": _jsonl, ".csv": _csv}
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


def _jsonl(path: Path) -> list[dict]:
    found = []
    for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}, is not JSON ({error.msg} at column "
                f"{error.colno}): write one whole JSON object on each line"
            ) from None
        if not isinstance(record, dict):
            raise ValueError(
                f"{path}, line {number}, holds a {type(record).__name__}: write one "
                'JSON object on each line, such as {"instruction": …, "output": …}'
            )
        found.append(record)
    return found


def _csv(path: Path) -> list[dict]:
    try:
        table = pandas.read_csv(
            path, dtype=str, keep_default_na=False, encoding="utf-8-sig"
        )
        # pandas lets a quote that is closed lines later swallow those lines
        csv.field_size_limit(2**31 - 1)  # the usual one is 128 KiB
        lines = csv.reader(io.StringIO(path.read_text("utf-8-sig")), strict=True)
        try:
            list(lines)
        except csv.Error as error:
            raise csv.Error(f"line {lines.line_num}: {error}") from None
    except pandas.errors.EmptyDataError:
        return []
    except (pandas.errors.ParserError, csv.Error) as error:
        raise ValueError(
            f"{path} is not a CSV file ({str(error).strip()}): give each line as many "
            'fields as the first, and put a field with commas into "quotes"'
        ) from None
    if not isinstance(table.index, pandas.RangeIndex):
        raise ValueError(
            f"{path}, line 2, has more fields than the first line has names: put a "
            'field with commas into "quotes"'
        )
    return table.to_dict("records")
