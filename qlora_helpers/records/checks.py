"""Whether records can be trained on, and what to do with those that cannot."""

import reprlib

COLUMNS = ("instruction", "input", "output")
KNOWN = {*COLUMNS, "system", "history", "family", "rule", "ordered"}
RENAMES = [  # columns of other data sets, and what to call them
    {"prompt": "instruction", "completion": "output"},
    {"prompt": "instruction", "response": "output"},
    {"question": "instruction", "answer": "output"},
    {"response": "output"},
]
ROLES = {  # of a chat's turns: the column that holds such a turn's text
    "system": "system",
    "user": "instruction",
    "human": "instruction",
    "assistant": "output",
    "gpt": "output",
}


def check_record(record: dict, row: int) -> None:
    """Raise ValueError, naming the row, unless a record can be trained on.

    `instruction` and `output` must be text; `input` and `system` may be empty or
    absent. A record with earlier turns in `history` is refused.
    """
    if not isinstance(record, dict):
        raise ValueError(f"row {row} is {record!r}: expected a dict with {COLUMNS}")
    for column in (*COLUMNS, "system"):
        value = record.get(column)
        needed = column in ("instruction", "output")
        if needed and column not in record:
            columns = sorted(map(str, record))
            raise ValueError(
                f"row {row} has no column {column!r}, only {columns}: {advice(record)}"
            )
        if not isinstance(value, str | None):
            way = f": {advice(record)}" if isinstance(value, list) else ""
            kind = type(value).__name__
            raise ValueError(
                f"row {row}: {column} is {reprlib.repr(value)} ({kind}), not text{way}"
            )
        if needed and not (value or "").strip():
            raise ValueError(f"row {row}: {column} is empty: drop it or fill it in")
    history = record.get("history")
    # pandas writes NaN, a float, where a row has no history
    if history and not isinstance(history, float):
        raise ValueError(
            f"row {row}: history holds earlier turns, but only one turn is supported: "
            "clear the column 'history', and write what it says into 'instruction'"
        )


def advice(record: dict) -> str:
    """Say how to make Alpaca's columns from a record that has other columns."""
    for names in RENAMES:
        if all(isinstance(record.get(name), str) for name in names):
            pairs = (f"{old} to {new}" for old, new in names.items())
            return "rename " + " and ".join(pairs)
    if turns := _turns(record):
        columns = [c for c in ("system", "instruction", "output") if c in turns]
        made = ", ".join(f"{column!r}: {turns[column]}" for column in columns)
        whole = {"instruction", "output"} <= set(columns)
        code = f", such as {{{made}}}" if whole else ""
        return (
            "several turns are not supported: put the text of the role user into "
            "instruction, that of assistant into output and that of system, if any, "
            f"into system{code}"
        )
    if isinstance(record.get("text"), str):
        return (
            "the column 'text' seems to hold question and answer: write the question "
            "into instruction and the answer into output"
        )
    return "rename or convert: instruction, input, output and system must be text"


def _turns(record: dict) -> dict:
    """For each of our columns: the code that takes its text from a record's chat."""
    found = {}
    for name, chat in record.items():
        if name == "history" or not isinstance(chat, list):
            continue
        for place, turn in enumerate(chat):
            if isinstance(turn, dict):
                column = ROLES.get(str(turn.get("role", turn.get("from"))))
                text = "value" if "value" in turn else "content"
                found.setdefault(column, f"row[{name!r}][{place}][{text!r}]")
    return found


def as_list(records) -> list[dict]:
    """The records as a list; raises ValueError for no records, or for what holds none.

    records: a list, a Dataset or another iterable of dicts.
    """
    # These can be iterated over, but give letters or the names of columns.
    no_rows = isinstance(records, str | dict) or hasattr(records, "iterrows")
    if no_rows or not hasattr(records, "__iter__"):
        raise ValueError(
            f"records is a {type(records).__name__}: give a list of dicts, one for "
            "each record, such as records['train'] of a DatasetDict, "
            "records.to_dict('records') of a DataFrame, or what was read from a file"
        )
    if not (found := list(records)):
        raise ValueError("the list of records is empty: give at least one record")
    return found
