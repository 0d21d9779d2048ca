"""The night-train task: made again byte for byte, balanced, fair, and hard to fool."""

import collections
import importlib.util
import os
import random
import re
import statistics
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from qlora_helpers import env, records, sql
from qlora_helpers.models.embedded import embedded_dir

FOLDER = env.path("data/night_trains")
COUNTS = dict(train=2000, validation=200, values=100, phrasing=100, composition=100)
TESTS = ("values", "phrasing", "composition")
SPLITS = {split: records.load(split) for split in records.SPLITS}
# where a query holds what its question names: one group, the value
SLOTS = {
    "train": r"train='(\w+)'",
    "city": r"home='(\w+)'",
    "rider": r"rider='(\w+)'",
    "trip": r"trip=(\d+)",
    "month": r"day LIKE '([\d-]+)%'",
    "day": r"day='([\d-]+)'",
    "price": r"price>(\d+)",
    "km": r"WHERE km>(\d+)",
    "dish": r"meal='(\w+)'",
    "limit": r"LIMIT (\d+)",
}
# where it holds a house rule, and what one who does not know the rule might write
RULES = {
    r"late>(15)": ("0", "5", "10", "30"),
    r"late<=(5)": ("0", "10", "15"),
    r"state=(\d)": ("1", "2", "3"),
    r"state<(3)": ("2", "4"),
    r"bed=(\d)": ("1", "2", "3"),
    r"AND km>(1000)": ("500", "1500"),
    r">=(3)": ("1", "2", "5"),
    r"day>='(2024-12-15)'": ("2025-01-01", "2024-12-01"),
}


@pytest.fixture(scope="module")
def families():
    """The module that reads the families."""
    spec = importlib.util.spec_from_file_location("build", FOLDER / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def databases():
    opened = records.open_databases()
    yield opened
    for database in opened:
        database.close()


def test_the_script_makes_the_committed_files_again(tmp_path):
    subprocess.run(
        [sys.executable, FOLDER / "build.py", tmp_path],
        check=True,
        capture_output=True,
        cwd=tmp_path,  # it needs no certain place to run from
        env=os.environ | {"PYTHONHASHSEED": "1"},  # nor a certain order of sets
    )
    made = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    committed = {
        file.name: file.read_bytes()
        for file in FOLDER.iterdir()
        if file.suffix in (".sql", ".jsonl")
    }
    assert len(committed) == 8
    assert made.keys() == committed.keys()
    assert [name for name in made if made[name] != committed[name]] == []


@pytest.mark.parametrize("split", COUNTS)
def test_each_split_has_its_size_and_is_balanced(split):
    assert len(SPLITS[split]) == COUNTS[split]
    sizes = collections.Counter(record["family"] for record in SPLITS[split])
    assert len(sizes) >= (10 if split == "composition" else 24)
    assert min(sizes.values()) >= max(sizes.values()) / 2
    ruled = sum(record["rule"] is not None for record in SPLITS[split])
    assert ruled >= len(SPLITS[split]) / 3


def test_families_are_many_and_a_third_rest_on_house_rules(families):
    names = [family.name for family in families.FAMILIES + families.COMPOSITIONS]
    assert len(set(names)) == len(names)
    assert len(families.FAMILIES) >= 24
    rules = [family.rule for family in families.FAMILIES if family.rule]
    assert len(rules) >= len(families.FAMILIES) / 3
    assert set(rules) == families.HOUSE_RULES.keys()


def test_families_have_wordings_enough_and_none_is_shared(families):
    for family in families.FAMILIES:
        assert len(family.train) >= 4 and family.validation and family.test
        assert len([*family.train, *family.validation, *family.test]) >= 6
    wordings = [
        wording
        for family in families.FAMILIES + families.COMPOSITIONS
        for wording in (*family.train, *family.validation, *family.test)
    ]
    assert len(set(wordings)) == len(wordings)


def test_every_kind_of_query_occurs(families):
    queries = [family.sql for family in families.FAMILIES]
    kinds = (
        r"WHERE \w+='", r"WHERE \w+>", r" AND ", r"COUNT\(", r"SUM\(", r"AVG\(",
        r"MAX\(", "DISTINCT", "GROUP BY", "HAVING", "ORDER BY", "LIMIT", r"day='",
        r"day>='", "day LIKE", "IS NULL",
    )  # fmt: skip
    assert [
        kind for kind in kinds if not any(re.search(kind, q) for q in queries)
    ] == []
    joins = collections.Counter(query.count("JOIN") for query in queries)
    assert joins[0] and joins[1] and joins[2]  # one, two and three tables


def test_the_prompt_leaks_no_house_rule(families):
    tables = set(re.findall(r"\w+", records.SYSTEM))
    assert not re.search(r"\d", records.SYSTEM)
    for rule in families.HOUSE_RULES:  # "late" is a column; the rule is how late
        assert rule == "late" or not tables & set(rule.split())
    for family in families.FAMILIES + families.COMPOSITIONS:
        for wording in (*family.train, *family.validation, *family.test):
            assert set(re.findall(r"\d+", wording)) <= {"2025"}  # a timetable's name


def test_the_prompt_names_the_tables_as_they_are(databases):
    found = {}
    for table, columns in re.findall(r"(\w+)\(([^)]*)\)", records.SYSTEM):
        rows = databases[0].execute(f"SELECT * FROM {table}")
        found[table] = [column[0] for column in rows.description] == columns.split()
    assert found == {"train": True, "trip": True, "ticket": True}


def slots_in(query):
    """The values that a query took from its question, as {slot: value}."""
    hits = {slot: re.search(pattern, query) for slot, pattern in SLOTS.items()}
    return {slot: hit[1] for slot, hit in hits.items() if hit}


def test_each_question_names_the_values_of_its_query():
    for split in SPLITS.values():
        for record in split:
            values = slots_in(record["output"])
            for slot in ("month", "day"):
                values.pop(slot, None)  # in words there
            named = re.findall(r"\w+", record["instruction"])
            assert set(values.values()) <= set(named), record


def held(split):
    """Every value that a split's queries hold, as {slot: values}."""
    found = collections.defaultdict(set)
    for record in SPLITS[split]:
        for slot, value in slots_in(record["output"]).items():
            found[slot].add(value)
    return found


def test_the_values_asked_for_were_never_seen():
    seen, asked = held("train"), held("values")
    assert asked.keys() == SLOTS.keys()
    for slot in SLOTS.keys() - {"dish", "limit"}:  # beside a new trip, a new train
        assert not asked[slot] & seen[slot], slot


def values_blanked(query):
    """A query without what its question names; the house rules' constants stay."""
    for pattern in SLOTS.values():
        query = re.sub(pattern, lambda hit: hit[0].replace(hit[1], "_"), query, count=1)
    return query


def test_queries_of_the_composition_set_were_never_seen():
    seen = {values_blanked(record["output"]) for record in SPLITS["train"]}
    new = {values_blanked(record["output"]) for record in SPLITS["composition"]}
    assert len(seen) >= 24 and len(new) >= 10
    assert not new & seen
    for split in ("validation", "values", "phrasing"):
        assert {values_blanked(record["output"]) for record in SPLITS[split]} <= seen


MONTH = (
    "(?:Janu|Febru)ary|March|April|May|June|July|August|(?:Sept|Nov|Dec)ember|October"
)


def blanked(question, record):
    """A question without the values that it names."""
    question = re.sub(rf"\b(?:\d+ )?(?:{MONTH}) \d{{4}}\b", "_", question)
    for value in slots_in(record["output"]).values():
        question = re.sub(rf"\b{value}\b", "_", question)
    return question


def words(text):
    return frozenset(re.findall(r"\w+", text.lower()))


def nearness(text, others):
    """Share of words that a text has in common with the nearest of others: 1 is all."""
    here = words(text)
    return max(2 * len(here & there) / (len(here) + len(there)) for there in others)


def test_how_near_the_nearest_training_question_is():
    train = SPLITS["train"]
    questions = {record["instruction"] for record in train}
    wordings = {blanked(record["instruction"], record) for record in train}
    whole, bare = set(map(words, questions)), set(map(words, wordings))
    near, near_wording, known = {}, {}, {}
    for split in ("validation", *TESTS):
        asked = [record["instruction"] for record in SPLITS[split]]
        assert not questions & set(asked), "a question of training is asked again"
        worded = [blanked(record["instruction"], record) for record in SPLITS[split]]
        known[split] = sum(wording in wordings for wording in worded) / len(worded)
        near[split] = statistics.median(nearness(text, whole) for text in asked)
        near_wording[split] = statistics.median(nearness(w, bare) for w in worded)
        print(
            f"{split}: {known[split]:.0%} of the wordings known; words shared with the "
            f"nearest training question, median: {near[split]:.2f}, values left out: "
            f"{near_wording[split]:.2f}"
        )
    assert known == {"validation": 0, "values": 1, "phrasing": 0, "composition": 0}
    # new values in a known wording are nearest; a new combination is said in known
    # words, so that it is the query which is new there; a new phrasing is furthest
    assert near["values"] > near["composition"] > near["phrasing"]
    assert near_wording["values"] == 1 > near_wording["composition"]
    assert near_wording["composition"] > near_wording["phrasing"]
    assert near["phrasing"] < 0.75


def test_examples_are_short():
    tokenizer = AutoTokenizer.from_pretrained(embedded_dir())
    texts = []
    for split in SPLITS.values():
        for record in split:
            turns = records.messages(record, records.SYSTEM)
            turns.append({"role": "assistant", "content": record["output"]})
            texts.append(tokenizer.apply_chat_template(turns, tokenize=False))
    lengths = [len(ids) for ids in tokenizer(texts).input_ids]
    assert statistics.median(lengths) <= 80
    assert max(lengths) <= 120


def test_every_gold_answers_something_on_each_database(databases):
    for gold in {record["output"] for split in SPLITS.values() for record in split}:
        for database in databases:
            found = sql.run_sql(gold, database)
            assert found.error is None, gold
            assert found.rows and found.rows[0][-1] not in (None, 0), gold


def test_ordered_answers_have_no_ties(databases):
    ordered = {r["output"] for split in SPLITS.values() for r in split if r["ordered"]}
    assert any("LIMIT" in gold for gold in ordered)
    for gold in ordered:
        column = re.search(r"ORDER BY (\w+)", gold)[1]
        keys = re.sub(r"^SELECT \w+", f"SELECT {column}", gold)
        # one row more: the last within the limit must not tie with the first without
        keys = re.sub(r"\d+$", lambda n: str(int(n[0]) + 1), keys)
        for database in databases:
            values = [value for (value,) in database.execute(keys)]
            assert None not in values and len(set(values)) == len(values), gold


def test_only_ordered_records_ask_for_an_order():
    for split in SPLITS.values():
        for record in split:
            assert record["ordered"] == ("ORDER BY" in record["output"])


def judge_wrong(databases, alternatives):
    """Judge each gold with one value replaced: [(family, right on one, right on all)].

    `alternatives` is {pattern with one group: values to draw from}.
    """
    rng, verdicts = random.Random(0), []
    for split in ("validation", *TESTS):
        for record in SPLITS[split]:
            for pattern, values in alternatives.items():
                if not (hit := re.search(pattern, record["output"])):
                    continue
                other = rng.choice([value for value in values if value != hit[1]])
                start, end = hit.span(1)
                wrong = record["output"][:start] + other + record["output"][end:]
                rights = [
                    sql.judge(wrong, record, chosen).right
                    for chosen in (databases[:1], databases)
                ]
                verdicts.append((record["family"], *rights))
    return verdicts


def test_a_query_with_a_wrong_value_is_wrong(databases):
    values = [held(split) for split in SPLITS]
    pools = {
        pattern: sorted(set().union(*(found[slot] for found in values)))
        for slot, pattern in SLOTS.items()
    }
    verdicts = judge_wrong(databases, pools)
    on_one = sum(one for _, one, _ in verdicts) / len(verdicts)
    on_three = sum(three for _, _, three in verdicts) / len(verdicts)
    print(
        f"{len(verdicts)} wrong values, right: {on_one:.1%} on 1, {on_three:.1%} on 3"
    )
    assert len(verdicts) >= 500
    assert on_three < 0.02 and on_three <= on_one
    tried = collections.Counter(family for family, _, _ in verdicts)
    lucky = collections.Counter(family for family, _, three in verdicts if three)
    # no family's answer is the same whatever is asked for
    assert [name for name in lucky if lucky[name] > tried[name] / 5] == []


def test_a_query_that_ignores_a_house_rule_is_wrong(databases):
    verdicts = judge_wrong(databases, RULES)
    on_three = sum(three for _, _, three in verdicts) / len(verdicts)
    print(f"{len(verdicts)} wrong rules, right: {on_three:.1%} on 3")
    assert len(verdicts) >= 200
    assert on_three < 0.05
    tried = collections.Counter(family for family, _, _ in verdicts)
    lucky = collections.Counter(family for family, _, three in verdicts if three)
    assert [name for name in lucky if lucky[name] > tried[name] / 4] == []
