"""Whether records can be trained on, and what to do with those that cannot.

An error reads `what is wrong: details and what to do`, so that rows can be counted by
what is wrong.
"""

import contextlib
import reprlib

COLUMNS = ("instruction", "input", "output")
CHATS = {  # columns with a chat: what a turn calls its role and its text
    "messages": ("role", "content"),
    "conversations": ("from", "value"),  # as ShareGPT has it
}
ROLES = {"human": "user", "gpt": "assistant"}
KNOWN = {*COLUMNS, *CHATS, "system", "history", "family", "rule", "ordered"}
RENAMES = [  # columns of other data sets, and what to call them
    {"prompt": "instruction", "completion": "output"},
    {"prompt": "instruction", "response": "output"},
    {"question": "instruction", "answer": "output"},
    {"response": "output"},
]
# Keys of a turn that change what is trained on, unless they are empty or 1.
UNSUPPORTED = ("weight", "tool_calls", "function_call")
EMPTY = (None, 1, "", [])
TURNS = (
    "write a chat into 'messages', as a list of turns such as "
    "{'role': 'user', 'content': 'Hello'}"
)


@contextlib.contextmanager
def in_row(row: int):
    """Name the row in a ValueError that is raised for a record; its cause stays."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"row {row}: {error}") from error.__cause__


def check_record(record: dict) -> None:
    """Raise ValueError unless a record can be trained on.

    Either `instruction` and `output` are text, and `input` may be empty or absent; or
    `messages` (or ShareGPT's `conversations`) holds a chat whose last turn is the
    assistant's. `system` may be text, empty or absent.
    """
    if not isinstance(record, dict):
        raise ValueError(f"it is no dict: it is {reprlib.repr(record)}; give {COLUMNS}")
    chat = turns(record)
    for column in ("system",) if chat else (*COLUMNS, "system"):
        value = record.get(column)
        needed = column in ("instruction", "output")
        if needed and column not in record:
            columns = ", ".join(sorted(map(repr, record)))
            raise ValueError(
                f"no column {column!r}: the columns are {columns}; {advice(record)}"
            )
        if not isinstance(value, str | None):
            way = TURNS if isinstance(value, list) else "make it text"
            raise ValueError(
                f"{column} is not text: it is {reprlib.repr(value)} "
                f"({type(value).__name__}); {way}"
            )
        if needed and not (value or "").strip():
            raise ValueError(f"{column} is empty: drop it or fill it in")
    texts = [turn["content"] for turn in chat or ()]
    columns = ("system",) if chat else (*COLUMNS, "system")
    texts += [record.get(column) or "" for column in columns]
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half an emoji, where a program cut it
            raise ValueError(
                "a text holds half a character: it is "
                f"{text[error.start : error.end]!a} at {error.start}; remove it"
            ) from None
    if given(record, "history"):
        raise ValueError("history holds earlier turns: clear this column, and " + TURNS)


def given(record: dict, column: str):
    """What a record has in a column; None where it is empty, or pandas wrote NaN."""
    value = record.get(column)
    return None if isinstance(value, float) else value or None


def turns(record: dict) -> list[dict] | None:
    """The chat in a record as turns with `role` and `content`; None if it has none.

    Raises ValueError for a chat that cannot be trained on.
    """
    columns = [column for column in CHATS if given(record, column)]
    if not columns:
        return None
    more = [c for c in (*CHATS, *COLUMNS) if given(record, c) and c != columns[0]]
    if more:
        raise ValueError(f"{columns[0]} and {more[0]} are both filled: clear one")
    [column], found = columns, []
    role, text = CHATS[column]
    if not isinstance(record[column], list):
        raise ValueError(f"{column} is no list: {TURNS}")
    for place, turn in enumerate(record[column]):
        if not isinstance(turn, dict) or not {role, text} <= set(turn):
            raise ValueError(
                f"a turn lacks {role!r} or {text!r}: turn {place} of {column} is "
                f"{reprlib.repr(turn)}; {TURNS}"
            )
        said, content = str(turn[role]), turn[text]
        if not isinstance(content, str):
            raise ValueError(
                f"a turn is not text: turn {place} of {column} is "
                f"{reprlib.repr(content)} ({type(content).__name__}); make it text"
            )
        if key := next((k for k in UNSUPPORTED if turn.get(k, 1) not in EMPTY), None):
            raise ValueError(
                f"a turn has {key!r}, which is not supported: turn {place} of "
                f"{column}; remove this key, or drop the record"
            )
        said = ROLES.get(said, said)
        if not content.strip() and said != "system":
            raise ValueError(
                f"a turn is empty: turn {place} of {column}; drop the record or fill "
                "the turn in"
            )
        found.append({"role": said, "content": content})
    roles = [turn["role"] for turn in found]
    asked = roles[1:] if roles[0] == "system" else roles
    if not asked or asked != ["user", "assistant"] * (len(asked) // 2):
        raise ValueError(
            f"the turns do not alternate: the roles in {column} are "
            f"{reprlib.repr(roles)}; give a system message or none, and then user and "
            "assistant in turn, the assistant last"
        )
    return found


def unused(record: dict) -> set[str]:
    """The columns of a record, and keys of its turns, that nothing is made of."""
    names = {str(name) for name in set(record) - KNOWN}
    for column, known in CHATS.items():
        for turn in given(record, column) or ():
            keys = {key for key, value in turn.items() if value not in EMPTY}
            names |= {f"{key} of a turn" for key in keys - {*known, *UNSUPPORTED}}
    return names


def advice(record: dict) -> str:
    """Say how to make Alpaca's columns from a record that has other columns."""
    for names in RENAMES:
        if all(isinstance(record.get(name), str) for name in names):
            pairs = (f"{old} to {new}" for old, new in names.items())
            return "rename " + " and ".join(pairs)
    if any(isinstance(value, list) for value in record.values()):
        return TURNS
    if isinstance(record.get("text"), str):
        return (
            "the column 'text' seems to hold question and answer: write the question "
            "into instruction and the answer into output"
        )
    return "rename or convert: instruction, input, output and system must be text"


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
            "records.to_dict('records') of a DataFrame, or records.read(path) of a file"
        )
    if not (found := list(records)):
        raise ValueError("the list of records is empty: give at least one record")
    return found
