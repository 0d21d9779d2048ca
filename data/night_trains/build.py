"""Write the night-train task: three databases as SQL, and the records. Seeded.

    python data/night_trains/build.py [folder]

The three databases share one calendar, of which each leaves out other nights; homes,
lengths, delays and tickets differ too, so that a wrong query is not right by luck.
"""

import datetime
import itertools
import json
import pathlib
import random
import re
import sqlite3
import sys
import tomllib
from typing import NamedTuple

SEED = 2025
DATABASES = (1, 2, 3)  # seeds; the questions are asked of the first
TRAINING, VALIDATION, TEST = 2000, 200, 100  # records; TEST for each of the three sets
FIRST_DAY, LAST_DAY = datetime.date(2024, 1, 1), datetime.date(2025, 12, 13)
NIGHTS_PER_TRAIN, TICKETS_PER_TRIP = 18, (3, 8)
# More nights in December 2024, some before and some after the timetable changes: the
# house rule "timetable year 2025 begins on 15 December" has to matter.
DECEMBER_NIGHTS = {
    datetime.date(2024, 12, 1): (14, 2),  # (days to choose from, nights of each train)
    datetime.date(2024, 12, 15): (17, 4),
}
LEFT_OUT = 5  # one night in so many of the calendar's, others in each database

# The last quarter of each list is never seen in training: the `values` test asks it.
TRAINS = (
    "Aurora Orion Meteor Luna Fox Saturn Raven Silver Jupiter Willow Titan Owl Pearl "
    "Nova Wolf Apollo Echo Snow Galaxy Robin Venus Maple Hawk Pluto Shadow Moon Lion "
    "Comet Swan Neptune Atlas Ruby Storm Mercury Star Ghost"
).split()
CITIES = (
    "Vienna Oslo Lyon Hamburg Berlin Paris Rome Milan Venice Naples Geneva Basel "
    "Cologne Brussels Athens Amsterdam Budapest Madrid Stockholm Copenhagen"
).split()
RIDERS = (
    "Ada Omar Clara Mei Anton Julia Karl Nina Pablo Ruth Oscar Vera Chen Emma Stefan "
    "Rosa Boris Kate Luis Helen Simon Maya Victor Laura Adam Judith Lars Alice Diego "
    "Grace Carl Eva Noah Lin Maria Henri Susan Erik Philip Lucy"
).split()
DISHES = "soup pasta salad curry fish rice".split()


class Family(NamedTuple):
    """One shape of SQL and its wordings, as families.toml explains them."""

    name: str
    sql: str
    rule: str | None = None
    ordered: bool = False
    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()


HERE = pathlib.Path(__file__).parent
QUESTIONS = tomllib.loads((HERE / "families.toml").read_text(encoding="utf-8"))
HOUSE_RULES = QUESTIONS["house_rules"]
FAMILIES = [Family(**family) for family in QUESTIONS["families"]]
COMPOSITIONS = [Family(**family) for family in QUESTIONS["compositions"]]

SCHEMA = """\
CREATE TABLE train (
  train TEXT PRIMARY KEY,
  home TEXT NOT NULL,     -- the city where it is stabled
  km INTEGER NOT NULL     -- length of its route
);
CREATE TABLE trip (
  trip INTEGER PRIMARY KEY,
  train TEXT NOT NULL REFERENCES train,
  day TEXT NOT NULL,      -- evening of departure, ISO 8601
  late INTEGER,           -- minutes behind time at the terminus; NULL: never came
  state INTEGER NOT NULL  -- 1 ran, 2 cut short, 3 cancelled
);
CREATE TABLE ticket (
  trip INTEGER NOT NULL REFERENCES trip,
  rider TEXT NOT NULL,
  bed INTEGER NOT NULL,   -- 1 cabin, 2 couchette, 3 seat
  price INTEGER,          -- euros; NULL for staff
  meal TEXT,              -- NULL where none was ordered
  PRIMARY KEY (trip, rider)
);
"""


def pick(rng: random.Random, items: list, count: int) -> list:
    """`count` different items in random order, by choice() alone: it never changed."""
    left, picked = list(items), []
    for _ in range(count):
        picked.append(left.pop(rng.randrange(len(left))))
    return picked


def calendar() -> list[tuple[datetime.date, str]]:
    """Every night on which a train may leave, in order: trip 1 is the first of them."""
    rng, nights = random.Random(SEED), set()
    whole = {FIRST_DAY: ((LAST_DAY - FIRST_DAY).days + 1, NIGHTS_PER_TRAIN)}
    for train in TRAINS:
        for first, (days, count) in (whole | DECEMBER_NIGHTS).items():
            for night in pick(rng, range(days), count):
                nights.add((first + datetime.timedelta(night), train))
    return sorted(nights)


def table_rows(seed: int) -> dict[str, list[tuple]]:
    """The rows of the three tables for one seed."""
    rng = random.Random(seed)
    homes = CITIES + [rng.choice(CITIES) for _ in range(len(TRAINS) - len(CITIES))]
    homes = pick(rng, homes, len(homes))
    lengths = pick(rng, range(600, 1500), len(TRAINS))
    train = list(zip(TRAINS, homes, lengths, strict=True))
    trip, ticket, taken = [], [], set()
    for number, (day, name) in enumerate(calendar(), start=1):
        if rng.randrange(LEFT_OUT) == 0:
            continue
        state = rng.choice([1] * 15 + [2, 2] + [3, 3, 3])
        late = None
        while state == 1 and (late is None or (name, late) in taken):
            late = rng.randrange(rng.choice([6, 6, 16, 40, 100]))
        taken.add((name, late))  # no ties: "the worst three days" has one answer
        trip.append((number, name, day.isoformat(), late, state))
        for rider in pick(rng, RIDERS, rng.randrange(*TICKETS_PER_TRIP)):
            bed = rng.choice([1, 2, 2, 3, 3])
            price = {1: 110, 2: 60, 3: 30}[bed] + rng.randrange(40)
            staff, hungry = rng.randrange(8) == 0, rng.randrange(3) > 0
            meal = rng.choice(DISHES) if hungry else None
            ticket.append((number, rider, bed, None if staff else price, meal))
    return {"train": train, "trip": trip, "ticket": ticket}


def sql_literal(value: object) -> str:
    if value is None:
        return "NULL"
    return f"'{value}'" if isinstance(value, str) else str(value)


def script(seed: int) -> str:
    """The SQL that builds the database of one seed."""
    lines = [SCHEMA]
    for table, rows in table_rows(seed).items():
        lines.append(f"INSERT INTO {table} VALUES\n")
        values = ["(" + ",".join(map(sql_literal, row)) + ")" for row in rows]
        lines.append(",\n".join(values) + ";\n")
    return "".join(lines)


def split(items: list, held_out: bool) -> list:
    """The last quarter of a list where `held_out`, else the first three quarters."""
    cut = len(items) * 3 // 4
    return items[cut:] if held_out else items[:cut]


def slot_values(name: str, family: Family, held_out: bool) -> list[dict[str, str]]:
    """Every value of a slot as {placeholder: text}, training's or the held-out ones."""
    if name == "k":  # spread over the log, not the last trips of it
        trips = range(1, len(calendar()) + 1)
        return [{"k": str(k)} for k in trips if (k % 4 == 0) == held_out]
    if name == "m":
        months = [
            datetime.date(2024 + number // 12, number % 12 + 1, 1)
            for number in range(23)
        ]
        return [
            {"m": m.strftime("%B %Y"), "m_iso": m.strftime("%Y-%m")}
            for place, m in enumerate(months)
            if (place % 4 == 3) == held_out
        ]
    if name == "n":
        numbers = {
            "worst_days": range(2, 7),
            "trains_longer_than": range(600, 1475, 25),
        }[family.name]
        if family.name == "worst_days":  # the train is what is new there
            return [{"n": str(n)} for n in numbers]
        return [
            {"n": str(n)} for i, n in enumerate(numbers) if (i % 4 == 3) == held_out
        ]
    if name == "p":
        # below 130 euros every rider is a regular, and the price would not matter
        return [{"p": str(p)} for p in range(130, 148) if (p % 4 == 3) == held_out]
    if name == "f":  # the trip is what is new there
        return [{"f": dish} for dish in DISHES]
    items = {"t": TRAINS, "c": CITIES, "r": RIDERS}[name]
    return [{name: item} for item in split(items, held_out)]


def fillings(family: Family, held_out: bool) -> list[dict[str, str]]:
    """Every combination of values for a family's slots, as text."""
    slots = sorted(set(re.findall(r"{(\w)(?:_iso)?}", family.sql)))
    if "d" in slots:  # a day on which that train left: others have no answer
        trains = split(TRAINS, held_out) if "t" in slots else TRAINS
        return [
            {"t": train, "d": f"{day.day} {day:%B %Y}", "d_iso": day.isoformat()}
            for day, train in calendar()
            if train in trains and (day.toordinal() % 4 == 0) == held_out
        ]
    options = [slot_values(slot, family, held_out) for slot in slots]
    return [
        {key: text for part in parts for key, text in part.items()}
        for parts in itertools.product(*options)
    ]


def records_of(
    family: Family, wordings: list[str], held_out: bool, databases: list
) -> list[dict]:
    """Every record of a family in these wordings that all databases can answer."""
    records = []
    for filled in fillings(family, held_out):
        sql = family.sql.format(**filled)
        answers = [database.execute(sql).fetchall() for database in databases]
        if any(not rows or rows[0][-1] in (None, 0) for rows in answers):
            continue
        records += [
            {
                "instruction": wording.format(**filled),
                "input": "",
                "output": sql,
                "family": family.name,
                "rule": family.rule,
                "ordered": family.ordered,
            }
            for wording in wordings
        ]
    return records


def balanced(groups: list[list[dict]], total: int, rng: random.Random) -> list[dict]:
    """`total` records in random order, as evenly from the groups as they allow."""
    groups = sorted((pick(rng, group, len(group)) for group in groups), key=len)
    chosen = []
    for place, group in enumerate(groups):
        share = -(-(total - len(chosen)) // (len(groups) - place))
        chosen += group[:share]
    if len(chosen) != total:
        raise ValueError(f"{len(chosen)} records could be made, {total} are wanted")
    return pick(rng, chosen, len(chosen))


def splits() -> dict[str, list[dict]]:
    """All records: train, validation, values, phrasing and composition."""
    rng = random.Random(SEED)
    databases = [sqlite3.connect(":memory:") for _ in DATABASES]
    for seed, database in zip(DATABASES, databases, strict=True):
        database.executescript(script(seed))

    def take(total: int, wordings: str, held_out: bool) -> list[dict]:
        groups = [
            records_of(family, getattr(family, wordings), held_out, databases)
            for family in FAMILIES
        ]
        return balanced(groups, total, rng)

    made = {
        "train": take(TRAINING, "train", False),
        "validation": take(VALIDATION, "validation", False),
        "values": take(TEST, "train", True),
        "phrasing": take(TEST, "test", False),
    }
    parts = [
        records_of(family, family.test, False, databases) for family in COMPOSITIONS
    ]
    return made | {"composition": balanced(parts, TEST, rng)}


def main(folder: pathlib.Path) -> None:
    files = {f"database_{seed}.sql": script(seed) for seed in DATABASES}
    for name, records in splits().items():
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        files[f"{name}.jsonl"] = "\n".join(lines) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
        print(f"{name}: {len(text) / 1000:.0f} kB")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]) if sys.argv[1:] else HERE)
