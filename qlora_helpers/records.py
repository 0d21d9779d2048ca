"""Records (text-to-SQL, Alpaca) to prompt and completion.

A record is a dict with Alpaca's columns: `instruction`, `input` (may be empty) and
`output`. A column `system` can hold the record's own system message. The model learns
only the completion; the prompt carries no loss.
"""

import json
import os
import reprlib
import warnings

from datasets import Dataset, DatasetDict, IterableDatasetDict
from jinja2 import TemplateError

from . import env

# The system message of the night-train task: its tables, without the house rules.
SYSTEM = (
    "train(train home km) trip(trip train day late state)"
    " ticket(trip rider bed price meal)"
)
SPLITS = ("train", "validation", "values", "phrasing", "composition")
DATABASES = ("database_1.sql", "database_2.sql", "database_3.sql")
COLUMNS = ("instruction", "input", "output")
KNOWN = {*COLUMNS, "system", "history", "family", "rule", "ordered"}
MAX_LENGTH = 512  # tokens of a record; records and trainer need the same number
PAIRS = [
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("instruction", "response"),
]
ROLES = {  # of a chat's turns: the column that holds such a turn's text
    "system": "system",
    "user": "instruction",
    "human": "instruction",
    "assistant": "output",
    "gpt": "output",
}


def load(split: str) -> list[dict]:
    """The records of one split of the night-train task.

    Besides Alpaca's columns each holds `family`, `rule` (the house rule that its SQL
    rests on, or None) and `ordered` (True where the question asks for an order).

    Raises ValueError for an unknown split. Source: data/night_trains/build.py.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown: take one of {', '.join(SPLITS)}")
    file = env.path(f"data/night_trains/{split}.jsonl")
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def database_scripts() -> list[str]:
    """The SQL of the three differently seeded databases that a query is judged on."""
    return [
        env.path(f"data/night_trains/{name}").read_text(encoding="utf-8")
        for name in DATABASES
    ]


def check(record: dict, row: int) -> None:
    """Raise ValueError, naming the row, unless a record can be trained on.

    `instruction` and `output` must be text; `input` and `system` may be empty or
    absent. A record with earlier turns in `history` is refused.
    """
    if not isinstance(record, dict):
        raise ValueError(f"row {row} is {record!r}: expected a dict with {COLUMNS}")
    for column in ("instruction", "output"):
        if column not in record:
            raise ValueError(
                f"row {row} has no column {column!r}, only "
                f"{sorted(map(str, record))}: {advice(record)}"
            )
    for column in (*COLUMNS, "system"):
        value = record.get(column)
        if value is not None and not isinstance(value, str):
            way = f": {advice(record)}" if isinstance(value, list) else ""
            raise ValueError(
                f"row {row}: {column} is {reprlib.repr(value)} "
                f"({type(value).__name__}), not text{way}"
            )
        if column in ("instruction", "output") and not (value or "").strip():
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
    for pair in PAIRS:
        if all(isinstance(record.get(name), str) for name in pair):
            names = zip(pair, ("instruction", "output"), strict=True)
            return "rename " + " and ".join(f"{a} to {b}" for a, b in names if a != b)
    found = {}  # the code that takes a column's text from a chat
    for name, chat in record.items():
        for row, turn in enumerate(chat if isinstance(chat, list) else ()):
            if name != "history" and isinstance(turn, dict):
                column = ROLES.get(str(turn.get("role", turn.get("from"))))
                text = "value" if "value" in turn else "content"
                found.setdefault(column, f"row[{name!r}][{row}][{text!r}]")
    if found:
        columns = [c for c in ("system", "instruction", "output") if c in found]
        made = ", ".join(f"{column!r}: {found[column]}" for column in columns)
        whole = {"instruction", "output"} <= set(found)
        code = f", such as {{{made}}}" if whole else ""
        return (
            "each row must be one question and one answer, because several turns are "
            "not supported: put the text of the role user into instruction, that of "
            f"assistant into output and that of system, if any, into system{code}"
        )
    if any(isinstance(record.get(name), list) for name in (*COLUMNS, "system")):
        return "instruction, input, output and system must be text"
    if "text" in record:
        return (
            "the column 'text' seems to hold question and answer: write the question "
            "into instruction and the answer into output"
        )
    return "rename your columns to instruction, input and output, and put text in them"


def as_list(records) -> list[dict]:
    """The records as a list; raises ValueError for no records, or for what holds none.

    records: a list, a Dataset or another iterable of dicts.
    """
    kind = type(records).__name__
    if isinstance(records, DatasetDict | IterableDatasetDict):
        what = f"a {kind}: give one of its splits, such as records['train']"
    elif hasattr(records, "iterrows"):
        what = f"a {kind} of pandas: give records.to_dict('records')"
    elif isinstance(records, str | os.PathLike):
        what = f"{str(records)!r}: read the file, and give the list of its records"
    elif isinstance(records, dict) or not hasattr(records, "__iter__"):
        what = f"a {kind}: give a list of dicts, one for each record"
    else:
        if not (found := list(records)):
            raise ValueError("the list of records is empty: give at least one record")
        return found
    raise ValueError(f"records is {what}")


def adds_special_tokens(tokenizer) -> bool:
    """True if the tokenizer must write a prompt's special tokens (BOS) itself.

    It must if it has no chat template, because a template writes its own.
    """
    return not tokenizer.chat_template


def leading_ids(tokenizer) -> list[int]:
    """The ids that a tokenizer puts before a text: usually BOS or nothing."""
    [first, *_] = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    return ids[: ids.index(first)]


def context_ids(prompt: str | list[dict], tokenizer) -> list[int]:
    """The token ids that a model gets before its answer, in training and afterwards.

    prompt: a text from `prompt`, or the messages from which a chat template makes it.
    """
    if not isinstance(prompt, str):
        prompt = tokenizer.apply_chat_template(
            prompt, tokenize=False, add_generation_prompt=True
        )
    # Some tokenizers put an end token behind a text, which would end the answer.
    start = leading_ids(tokenizer) if adds_special_tokens(tokenizer) else []
    return start + tokenizer(prompt, add_special_tokens=False)["input_ids"]


def question(record: dict) -> str:
    """What the user says: the instruction, and below it the input, if there is one."""
    extra = (record.get("input") or "").strip()
    return record["instruction"] + (f"\n\n{extra}" if extra else "")


def system_of(record: dict, system: str | None) -> str | None:
    """The system message of a record: its own if it has one, else `system`.

    A message of white space counts as none. Raises ValueError for what is no text.
    """
    for text in (record.get("system"), system):
        if text is not None and not isinstance(text, str):
            raise ValueError(
                f"system is {reprlib.repr(text)} ({type(text).__name__}): give the "
                "system message as text, or None"
            )
        if text and text.strip():
            return text
    return None


def alpaca_layout(record: dict, system: str | None = None) -> str:
    """The `### Instruction:` prompt, for base models that have no chat template.

    The system message, if there is one, comes before it.
    Source: Stanford Alpaca's prompt without its preamble.
    """
    system = system_of(record, system)
    start = f"{system}\n\n" if system else ""
    extra = (record.get("input") or "").strip()
    middle = f"\n\n### Input:\n{extra}" if extra else ""
    return (
        f"{start}### Instruction:\n{record['instruction']}{middle}\n\n### Response:\n"
    )


def messages(record: dict, system: str | None) -> list[dict]:
    """The chat that asks a record's question; system: its system message, or None.

    Without one, SmolLM2's template adds a system message of its own.
    """
    system = system_of(record, system)
    start = [{"role": "system", "content": system}] if system else []
    return [*start, {"role": "user", "content": question(record)}]


def prompt(record: dict, tokenizer, system: str | None) -> str:
    """The text that the model is given, up to where its answer begins.

    system: the system message, or None. Raises ValueError for a chat template that
    refuses it or leaves it out.
    """
    if adds_special_tokens(tokenizer):
        return alpaca_layout(record, system)
    system = system_of(record, system)
    advice = "pass system=None, drop the column system, and put its text in instruction"
    try:
        text = tokenizer.apply_chat_template(
            messages(record, system), tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        if not system:
            raise
        raise ValueError(
            f"the chat template refuses the system message ({error}): {advice}"
        ) from None
    if system and system.strip() not in text:
        raise ValueError(f"the chat template leaves out the system message: {advice}")
    if question(record).strip() not in text:
        raise ValueError(
            "the chat template leaves out or changes the question: use one that writes "
            "the text of each message as it is"
        )
    return text


def whole_ids(record: dict, tokenizer, system: str | None) -> list[int]:
    """The token ids of a record's prompt and output together, as TRL trains on them."""
    output = record["output"]
    if adds_special_tokens(tokenizer):
        end = "" if output.endswith(tokenizer.eos_token) else tokenizer.eos_token
        return tokenizer(prompt(record, tokenizer, system) + output + end)["input_ids"]
    answered = [{"role": "assistant", "content": output}]
    whole = tokenizer.apply_chat_template(
        messages(record, system) + answered, tokenize=False
    )
    if output.strip() not in whole:
        raise ValueError(
            "the chat template leaves out or changes the output: use one that writes "
            "the text of each message as it is"
        )
    return tokenizer(whole, add_special_tokens=False)["input_ids"]


def to_prompt_completion(
    records, tokenizer, *, system: str | None, max_length: int | None = MAX_LENGTH
) -> Dataset:
    """A Dataset with the columns `prompt` and `completion`, as TRL takes them.

    `records` is a list of dicts or a Dataset with Alpaca's columns. `system` is the
    system message of every record that has none in a column `system`; None means no
    message. With a chat template both columns hold messages, and TRL renders them; else
    they hold text, and TRL adds the end token. Records over `max_length` tokens are
    left out, because rows that are cut teach the model to stop early. One warning
    counts and names these rows; another names the columns that are not used.

    Raises ValueError, naming the row, for a record that cannot be trained on or whose
    prompt's tokens in training differ from those when it is asked. Raises ValueError
    if no record is left.
    """
    bare = adds_special_tokens(tokenizer)
    if bare and not tokenizer.eos_token:
        raise ValueError(
            "the tokenizer has neither a chat template nor an end token: set "
            "tokenizer.eos_token to the token at which answers end"
        )
    if max_length is not None:
        env.check_whole("max_length", max_length)
    rows, too_long, unused = [], [], set()
    for number, record in enumerate(as_list(records)):
        check(record, number)
        unused |= {str(name) for name in set(record) - KNOWN}
        text, output = prompt(record, tokenizer, system), record["output"]
        end = tokenizer.eos_token
        if end and end in (output.removesuffix(end) if bare else output):
            raise ValueError(
                f"row {number}: output holds the end token {end!r}, so the model would "
                "learn to stop there: remove it; it is added at the end by itself"
            )
        asked, answered = text, output
        if not bare:
            asked = messages(record, system)
            answered = [{"role": "assistant", "content": output}]
        ids = whole_ids(record, tokenizer, system)
        context = context_ids(text, tokenizer)
        if ids[: len(context)] != context:
            raise ValueError(
                f"row {number}: the prompt's tokens change when the output follows, so "
                "the model would be trained and asked with different ones: "
                + (
                    "remove the white space at the output's start"
                    if bare or output[0].isspace()
                    else "use a chat template that keeps prompt and output apart"
                )
            )
        if max_length is not None and len(ids) > max_length:
            too_long.append(number)
        else:
            rows.append({"prompt": asked, "completion": answered})
    if unused:
        warnings.warn(
            f"these columns are not used: {', '.join(sorted(unused))} (only "
            "instruction, input, output and system are)",
            stacklevel=2,
        )
    if too_long:
        named = ", ".join(map(str, too_long[:5])) + (" …" if too_long[5:] else "")
        warnings.warn(
            f"{len(too_long)} of {len(too_long) + len(rows)} records are longer than "
            f"max_length={max_length} tokens and are left out (rows {named}): "
            "raise max_length to keep them",
            stacklevel=2,
        )
    if not rows:
        raise ValueError(
            f"no record is left to train on: all {len(too_long)} are longer than "
            f"max_length={max_length}"
        )
    return Dataset.from_list(rows)
