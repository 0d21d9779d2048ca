"""Records (text-to-SQL, Alpaca) to prompt and completion.

A record is a dict with Alpaca's columns: `instruction`, `input` (may be empty) and
`output`. The model learns the completion alone; the prompt carries no loss.
"""

import json
import warnings

from datasets import Dataset

from . import env

# The system message of the night-train task: its tables, without the house rules.
SYSTEM = (
    "train(train home km) trip(trip train day late state)"
    " ticket(trip rider bed price meal)"
)
SPLITS = ("train", "validation", "values", "phrasing", "composition")
DATABASES = ("database_1.sql", "database_2.sql", "database_3.sql")
COLUMNS = ("instruction", "input", "output")


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

    `input` may be empty or absent; `instruction` and `output` must be text.
    """
    if not isinstance(record, dict):
        raise ValueError(f"row {row} is {record!r}: expected a dict with {COLUMNS}")
    for column in COLUMNS:
        value = record.get(column, "" if column == "input" else None)
        if column not in record and value is None:
            raise ValueError(
                f"row {row} has no column {column!r}, only {sorted(record)}: "
                "rename yours to instruction, input and output"
            )
        if value is not None and not isinstance(value, str):
            raise ValueError(
                f"row {row}: {column} is {value!r} ({type(value).__name__}), not text"
            )
        if column != "input" and not (value or "").strip():
            raise ValueError(f"row {row}: {column} is empty: drop it or fill it in")


def question(record: dict) -> str:
    """What the user says: the instruction, and below it the input, if there is one."""
    extra = (record.get("input") or "").strip()
    return record["instruction"] + (f"\n\n{extra}" if extra else "")


def alpaca_layout(record: dict) -> str:
    """The `### Instruction:` prompt, for base models that have no chat template.

    Source: Stanford Alpaca's prompt without its preamble.
    """
    extra = (record.get("input") or "").strip()
    middle = f"\n\n### Input:\n{extra}" if extra else ""
    return f"### Instruction:\n{record['instruction']}{middle}\n\n### Response:\n"


def messages(record: dict, system: str | None = SYSTEM) -> list[dict]:
    """The chat that asks a record's question.

    The system message is always our own: SmolLM2's template adds another where none is.
    """
    start = [{"role": "system", "content": system}] if system else []
    return [*start, {"role": "user", "content": question(record)}]


def prompt(record: dict, tokenizer, system: str | None = SYSTEM) -> str:
    """The text that the model is given, up to where its answer begins."""
    if tokenizer.chat_template is None:
        return alpaca_layout(record)
    return tokenizer.apply_chat_template(
        messages(record, system), tokenize=False, add_generation_prompt=True
    )


def to_prompt_completion(
    records, tokenizer, max_length: int | None = None, system: str | None = SYSTEM
) -> Dataset:
    """A Dataset with the columns `prompt` and `completion`, as TRL takes them.

    `records` is a list of dicts or a Dataset with Alpaca's columns. With a chat
    template both columns hold messages, and TRL renders them; else they hold text, and
    TRL adds the end token. Records over `max_length` tokens are left out, with a
    warning that counts them and names the rows: cut off, they teach to stop early.

    Raises ValueError naming the row for a record that cannot be trained on, and where
    none is left.
    """
    rows, too_long = [], []
    for number, record in enumerate(records):
        check(record, number)
        if tokenizer.chat_template is None:
            asked, answered = prompt(record, tokenizer), record["output"]
            text = asked + answered + tokenizer.eos_token
        else:
            asked = messages(record, system)
            answered = [{"role": "assistant", "content": record["output"]}]
            text = tokenizer.apply_chat_template(asked + answered, tokenize=False)
        if max_length and len(tokenizer(text).input_ids) > max_length:
            too_long.append(number)
        else:
            rows.append({"prompt": asked, "completion": answered})
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
            if too_long
            else "no record to train on: the list is empty"
        )
    return Dataset.from_list(rows)
