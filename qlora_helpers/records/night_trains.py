"""The text-to-SQL task of the course: its records and its databases."""

import json

from qlora_helpers import env

# The system message of the night-train task: its tables, without the house rules.
SYSTEM = (
    "train(train home km) trip(trip train day late state)"
    " ticket(trip rider bed price meal)"
)
SPLITS = ("train", "validation", "values", "phrasing", "composition")
DATABASES = ("database_1.sql", "database_2.sql", "database_3.sql")


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
