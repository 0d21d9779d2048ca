"""The text-to-SQL task of the course: its records and its databases."""

import json
import tomllib

from qlora_helpers import env, sql

# The system message of the night-train task: its tables, without the house rules.
SYSTEM = (
    "train(train home km) trip(trip train day late state)"
    " ticket(trip rider bed price meal)"
)
SPLITS = ("train", "validation", "values", "phrasing", "composition")


def load(split: str) -> list[dict]:
    """The records of one split of the night-train task.

    Besides Alpaca's columns each holds `family`, `rule` (the house rule that its SQL
    rests on, or None) and `ordered` (True where the question asks for an order).

    Raises ValueError for an unknown split. Source: data/night_trains/build.py.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown: take one of {', '.join(SPLITS)}")
    return [json.loads(line) for line in _read(f"{split}.jsonl").splitlines()]


def database_scripts() -> list[str]:
    """The SQL of the three differently seeded databases that a query is judged on."""
    return [_read(f"database_{number}.sql") for number in (1, 2, 3)]


def open_databases() -> list:
    """The three databases, opened by `sql.open_database`."""
    return [sql.open_database(script) for script in database_scripts()]


def told() -> str:
    """A system message that asks for SQL and states the tables and the house rules."""
    rules = tomllib.loads(_read("families.toml"))["house_rules"].values()
    lines = "".join(f"- {rule}\n" for rule in rules)
    ask = "Answer with one SQLite query and nothing else. The tables:"
    return f"{ask}\n{SYSTEM}\nThe house rules:\n{lines}".strip()


def few_shot(record: dict, system: str, count: int) -> dict:
    """The record as a chat that first solves `count` training questions.

    They are the first ones of different families. `system` is the system message, None
    for none.
    """
    families = {}
    for example in load("train"):
        families.setdefault(example["family"], example)
    chat = [{"role": "system", "content": system}] if system else []
    for solved in [*[*families.values()][:count], record]:
        chat.append({"role": "user", "content": solved["instruction"]})
        chat.append({"role": "assistant", "content": solved["output"]})
    kept = {name: record[name] for name in ("rule", "ordered")}
    return kept | {"messages": chat}


def _read(name: str) -> str:
    return env.path(f"data/night_trains/{name}").read_text(encoding="utf-8")
