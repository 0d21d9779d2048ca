"""Running and judging SQL: hostile statements, equal results, verdicts."""

import hashlib
import math
import os
import signal
import sqlite3
import threading

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_helpers import sql as judging
from qlora_helpers.sql import extract_sql, judge, open_database, run_sql, same_result

SCHEMA = "CREATE TABLE star (id INTEGER, name TEXT, magnitude REAL);\n"
STARS = [
    [(1, "Vega", 0.03), (2, "Deneb", 1.25), (3, "Altair", 0.76), (4, "dark", None)],
    [(1, "Vega", 1.75), (2, "Deneb", 0.5), (3, "Spica", 0.97)],
    [(1, "Mira", 3.04), (2, "Deneb", 1.25), (5, "Rigel", 0.13)],
]
DOUBLING = "WITH c0 AS (SELECT 1)" + "".join(
    f", c{i} AS (SELECT 1 FROM c{i - 1}, c{i - 1})" for i in range(1, 30)
)
COUNT = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
# a text of 8,000 letters beside 100,000 numbers: 800 MB for whoever keeps it
NUMBERS = COUNT.replace("FROM n", "FROM n LIMIT 100000")
LETTERS = (
    "SELECT replace(replace(replace("
    f"'{'a' * 20}', 'a', '{'a' * 20}'), 'a', '{'a' * 20}'), 'a', 'a') AS x"
)
LONG = f"{NUMBERS}, s AS MATERIALIZED ({LETTERS}) "
HOSTILE = {
    "attach": "ATTACH DATABASE 'made.db' AS made",
    "detach": "DETACH DATABASE main",
    "pragma": "PRAGMA user_version = 7",
    "pragma_read": "PRAGMA query_only = OFF",
    "pragma_function": "SELECT * FROM pragma_table_info('star')",
    "insert": "INSERT INTO star VALUES (9, 'Sun', -26.7)",
    "insert_returning": "INSERT INTO star VALUES (9, 'Sun', 0) RETURNING id",
    "insert_after_with": "WITH s AS (SELECT 9) INSERT INTO star (id) SELECT * FROM s",
    "replace_into": "REPLACE INTO star VALUES (1, 'Sun', 0)",
    "update": "UPDATE star SET name = 'Sun'",
    "delete": "DELETE FROM star",
    "delete_after_with": "WITH s AS (SELECT 1) DELETE FROM star RETURNING id",
    "drop": "DROP TABLE star",
    "alter": "ALTER TABLE star ADD COLUMN colour TEXT",
    "create": "CREATE TABLE made AS SELECT * FROM star",
    "create_temp": "CREATE TEMP TABLE made (id INTEGER)",
    "create_virtual": "CREATE VIRTUAL TABLE made USING fts5(id)",
    "create_view": "CREATE VIEW made AS SELECT 1",
    "create_index": "CREATE INDEX made ON star (name)",
    "create_trigger": "CREATE TRIGGER made DELETE ON star BEGIN SELECT 1; END",
    "vacuum": "VACUUM",
    "vacuum_into": "VACUUM INTO 'made.db'",
    "reindex": "REINDEX",
    "analyze": "ANALYZE",
    "begin": "BEGIN EXCLUSIVE",
    "commit": "COMMIT",
    "rollback": "ROLLBACK",
    "savepoint": "SAVEPOINT made",
    "load_extension": "SELECT load_extension('made')",
    "readfile": "SELECT readfile('secret.txt')",
    "writefile": "SELECT writefile('made.txt', 'x')",
    "select_into": "SELECT * INTO made FROM star",
    "explain": "EXPLAIN SELECT 1",
    "random": "SELECT random()",
    "json_table": "SELECT * FROM json_each('[1, 2]')",
    "two_statements": "SELECT 1; DROP TABLE star",
    "comment_then_drop": "/* SELECT */ DROP TABLE star -- SELECT",
    "comment_splits": "SELECT 1 /* ; */ ; /* */ DELETE FROM star",
    "nul_byte": "SELECT 1\0; DROP TABLE star",
    "surrogate": "SELECT '\ud800'",
    "not_utf8": "SELECT CAST(x'ff' AS TEXT)",
    "parameter": "SELECT ?",
    "none": None,
    "number": 7,
    "bytes": b"SELECT 1",
    "empty": "",
    "blank": " \n\t ",
    "only_a_comment": "-- SELECT 1",
    "only_semicolon": ";",
    "chatter": "I am sorry, I cannot do that.",
    "endless": f"{COUNT} SELECT count(*) FROM n",
    "endless_union": f"{COUNT.replace(' ALL', '')} SELECT count(*) FROM n",
    "endless_rows": f"{COUNT} SELECT i FROM n",
    "endless_sort": f"{COUNT} SELECT i FROM n ORDER BY i DESC",
    "endless_concat": f"{COUNT} SELECT group_concat(i) FROM n",
    "cross_join": "SELECT count(*) FROM " + ", ".join(f"star s{i}" for i in range(20)),
    "zeroblob": "SELECT zeroblob(1000000000)",
    "zeroblob_length": "SELECT length(zeroblob(1000000000))",
    "hex_zeroblob": "SELECT hex(zeroblob(400000000))",
    "randomblob": "SELECT length(randomblob(900000000))",
    "printf": "SELECT length(printf('%.*c', 1000000000, 'x'))",
    "format": "SELECT format('%900000000d', 1)",
    "concat_doubling": "WITH RECURSIVE s(x) AS (SELECT 'ab' UNION ALL "
    "SELECT x || x FROM s) SELECT max(length(x)) FROM s",
    "replace": "SELECT replace(replace(replace(replace("
    + f"'{'a' * 200}'" + f", 'a', '{'a' * 200}')" * 4,
    "keeps_sorted": LONG + "SELECT x || i FROM n, s ORDER BY 1",
    "keeps_distinct": LONG + "SELECT DISTINCT x || i FROM n, s LIMIT 1 OFFSET 99999",
    "keeps_window": LONG + "SELECT max(x || i) OVER (ORDER BY i DESC) FROM n, s",
    "keeps_rows": f"{NUMBERS} SELECT " + ", ".join(f"x || {i}" for i in range(49))
    + f" FROM n, ({LETTERS} LIMIT 1) LIMIT 999",
    "slow_function": LONG + "SELECT sum(length(replace(x || i, 'a', ''))) FROM n, s",
    "like": LONG + f"SELECT 1 FROM n, s WHERE x || i LIKE '{'%a' * 2000}'",
    "many_columns": "SELECT " + ", ".join("1" for _ in range(1000)),
    "deep_brackets": "SELECT " + "(" * 900 + "1" + ")" * 900,
    "deep_sum": "SELECT " + "+".join("1" for _ in range(900)),
    "deep_not": "SELECT " + "NOT " * 900 + "1",
    "many_unions": " UNION ALL ".join(["SELECT 1"] * 150),
    "doubling_with": f"{DOUBLING} SELECT count(*) FROM c29",
    "doubling_with_in": DOUBLING.replace("1 FROM", "1 IN").replace(", c", " OR 1 IN c")
    .replace(") OR 1 IN c", "), c") + " SELECT 1 IN c29",
    "doubling_with_comment": DOUBLING.replace("AS (", "AS/**/(")
    + " SELECT count(*) FROM c29",
    "huge_in": f"SELECT 1 WHERE 1 IN ({', '.join(str(i) for i in range(2, 90000))})",
    "unclosed": "SELECT 'abc",
    "no_table": "SELECT * FROM planet",
}  # fmt: skip


def script_of(stars):
    """The SQL script of a database of stars."""
    values = [f"({i}, '{n}', {'NULL' if m is None else m})" for i, n, m in stars]
    return SCHEMA + f"INSERT INTO star VALUES {', '.join(values)};\n"


@pytest.fixture
def databases():
    """Three databases of the same tables with other contents."""
    opened = [open_database(script_of(stars)) for stars in STARS]
    yield opened
    for database in opened:
        database.close()


def fingerprint(database):
    """Hash of everything a database holds."""
    return hashlib.sha256("\n".join(database.iterdump()).encode()).hexdigest()


class Watch:
    """Most bytes that this process grew by while the block ran."""

    def __enter__(self):
        self.process, self.done = psutil.Process(), threading.Event()
        self.start = self.peak = self.process.memory_info().rss
        self.thread = threading.Thread(target=self.look)
        self.thread.start()
        return self

    def look(self):
        while not self.done.wait(0.002):
            self.peak = max(self.peak, self.process.memory_info().rss)

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()
        self.grown = self.peak - self.start


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_sql_gets_an_error_and_changes_nothing(
    name, databases, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SQLITE_TMPDIR", str(tmp_path))
    (tmp_path / "secret.txt").write_text("secret", encoding="utf-8")
    database = databases[0]
    before, files = fingerprint(database), sorted(os.listdir(tmp_path))
    with Watch() as watch:
        result = run_sql(HOSTILE[name], database, max_seconds=1.0)
    assert result.error, result.rows[:3]
    assert result.rows == [] and result.columns == []
    assert "secret" not in result.error
    assert watch.grown < 120 * 2**20, f"{watch.grown / 2**20:.0f} MiB"
    assert sorted(os.listdir(tmp_path)) == files
    assert fingerprint(database) == before
    assert not database.in_transaction
    again = run_sql("SELECT name FROM star ORDER BY id", database)
    assert again == (["name"], [(n,) for _, n, _ in STARS[0]], None)


WRITES = [n for n, sql in HOSTILE.items() if "made" in str(sql) or "star" in str(sql)]


@pytest.mark.parametrize("name", WRITES)
def test_reading_alone_holds_without_the_look_at_the_first_word(
    name, databases, tmp_path, monkeypatch
):
    monkeypatch.setattr(judging, "_refuse", lambda sql: None)
    test_hostile_sql_gets_an_error_and_changes_nothing(
        name, databases, tmp_path, monkeypatch
    )


def test_a_slow_query_stops_at_the_seconds_given(databases):
    result = run_sql(HOSTILE["slow_function"], databases[0], max_seconds=0.2)
    assert result.error == "stopped after 0.2 s"


def test_an_endless_query_stops_by_counted_steps(databases):
    result = run_sql(HOSTILE["endless"], databases[0], max_seconds=60)
    assert result.error == "stopped after 20,000,000 steps"


@pytest.mark.parametrize(
    ("sql", "rows"),
    [
        ("select count(*) from star;", [(4,)]),
        ("SELECT name FROM star WHERE magnitude IS NULL", [("dark",)]),
        ("-- bright\nSELECT round(avg(magnitude), 2) FROM star", [(0.68,)]),
        ("WITH b AS (SELECT * FROM star) SELECT max(id) FROM b", [(4,)]),
        ("SELECT strftime('%Y', '2031-05-01'), upper('a') || ';'", [("2031", "A;")]),
        ("SELECT name FROM star WHERE name LIKE 'de%' OR name GLOB 'V*' ORDER BY 1",
         [("Deneb",), ("Vega",)]),
        ("SELECT id, rank() OVER (ORDER BY magnitude DESC) FROM star LIMIT 1",
         [(2, 1)]),
        ("SELECT a.id FROM star a JOIN star b ON a.id = b.id + 1 GROUP BY 1 "
         "HAVING count(*) > 0 ORDER BY 1 LIMIT 1 OFFSET 1", [(3,)]),
        ("WITH a AS (SELECT id, name, magnitude FROM star), b AS (SELECT a.id, a.name, "
         "a.magnitude FROM a JOIN star s ON a.id = s.id) SELECT b.name, a.magnitude "
         "FROM a JOIN b ON a.id = b.id WHERE a.id IN (1, 2) AND b.id IN (1, 3)",
         [("Vega", 0.03)]),
        ("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3) "
         "SELECT sum(i) FROM n", [(6,)]),
        ("SELECT CASE WHEN id > 3 THEN 'x' ELSE iif(id = 1, 'y', 'z') END FROM star "
         "WHERE id IN (1, 4) ORDER BY id", [("y",), ("x",)]),
    ],
)  # fmt: skip
def test_honest_queries_run(sql, rows, databases):
    result = run_sql(sql, databases[0])
    assert (result.error, result.rows) == (None, rows)


def test_the_guard_is_gone_after_a_query(databases):
    before = databases[0].getlimit(sqlite3.SQLITE_LIMIT_LENGTH)
    run_sql("DROP TABLE star", databases[0])
    run_sql("SELECT 1", databases[0])
    assert databases[0].getlimit(sqlite3.SQLITE_LIMIT_LENGTH) == before
    assert databases[0].execute("SELECT length(zeroblob(20000))").fetchone() == (20000,)
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        databases[0].execute("DELETE FROM star")


def test_rows_up_to_the_limit_come_back(databases):
    assert len(run_sql("SELECT id FROM star", databases[0], max_rows=4).rows) == 4
    refused = run_sql("SELECT id FROM star", databases[0], max_rows=3)
    assert refused == ([], [], "more than 3 rows")


@pytest.mark.parametrize(
    ("text", "sql"),
    [
        ("SELECT 1", "SELECT 1"),
        ("  SELECT 1;\n", "SELECT 1"),
        ("```sql\nSELECT a\n\nFROM b;\n```\nIt counts.", "SELECT a\n\nFROM b"),
        ("Sure:\n```\nselect 1\n```", "select 1"),
        ("```sql\nSELECT a FROM b", "SELECT a FROM b"),
        ("To select them, use this: SELECT a FROM b;", "SELECT a FROM b"),
        ("With this query: SELECT a FROM b\n\nIt returns a.", "SELECT a FROM b"),
        ("Use `SELECT a FROM b` here.", "SELECT a FROM b"),
        ("WITH c AS (SELECT 1) SELECT 2", "WITH c AS (SELECT 1) SELECT 2"),
        ("SQL: with c(x) as (select 1) select x from c",
         "with c(x) as (select 1) select x from c"),
        ("select a from b where c in (SELECT 1);",
         "select a from b where c in (SELECT 1)"),
        ("select a\n\nfrom b\n\nORDER BY a\n\nFrom b it takes a.",
         "select a\n\nfrom b\n\nORDER BY a"),
        ("WITH c AS (\nSELECT 1\n)\n\nSELECT 2\n\nIt counts.",
         "WITH c AS (\nSELECT 1\n)\n\nSELECT 2"),
        ("SELECT 1\n\nSELECT 2", "SELECT 1"),
        ("SELECT ';' || 'it''s; ok' FROM b; DROP TABLE b",
         "SELECT ';' || 'it''s; ok' FROM b"),
        ("I do not know.", "I do not know."),
        ("", ""),
    ],
)  # fmt: skip
def test_sql_is_taken_out_of_an_answer(text, sql):
    assert extract_sql(text) == sql


@given(st.text())
@settings(deadline=None)
def test_taking_sql_out_never_fails_or_adds(text):
    assert extract_sql("SELECT " + text) in "SELECT " + text


CELLS = st.one_of(
    st.none(),
    st.integers(-(10**7), 10**7),
    st.integers(-(10**6), 10**6).map(lambda n: n / 100),
    st.sampled_from(["", "a", "A", "1"]),
)
ROWS = st.lists(st.tuples(CELLS, CELLS), max_size=6)


@given(ROWS, ROWS, st.booleans())
@settings(deadline=None)
def test_same_result_is_symmetric_and_reflexive(a, b, ordered):
    assert same_result(a, a, ordered)
    assert same_result(a, b, ordered) == same_result(b, a, ordered)


@given(ROWS, st.randoms())
@settings(deadline=None)
def test_order_counts_only_where_asked(rows, random):
    shuffled = random.sample(rows, len(rows))
    assert same_result(rows, shuffled, ordered=False)
    assert same_result(rows, shuffled, ordered=True) == (rows == shuffled)


@given(ROWS, st.floats(-1e-10, 1e-10))
@settings(deadline=None)
def test_rounding_noise_does_not_count(rows, noise):
    def shake(value):
        number = isinstance(value, int | float)
        return value * (1 + noise) if number else value

    assert same_result([tuple(map(shake, row)) for row in rows], rows, ordered=True)


@given(ROWS.filter(len), st.data())
@settings(deadline=None)
def test_one_changed_cell_counts(rows, data):
    row = data.draw(st.integers(0, len(rows) - 1))
    old, second = rows[row]
    new = old + 1 if isinstance(old, int | float) else f"not {old}"
    changed = rows[:row] + [(new, second)] + rows[row + 1 :]
    assert not same_result(changed, rows, ordered=False)
    assert not same_result(changed, rows, ordered=True)


@pytest.mark.parametrize(
    ("predicted", "gold", "same"),
    [
        ([(3,)], [(3.0,)], True),
        ([(0.1 + 0.2,)], [(0.3,)], True),
        ([(600000.5,)], [(600000.5 + 1e-9,)], True),
        ([(0.0,)], [(5e-17,)], True),
        ([(1 - 1e-16,)], [(1,)], True),
        ([(2_000_001,)], [(2_000_002,)], False),
        ([(2_000_000.5,)], [(2_000_000.5 + 1e-9,)], True),
        ([(2_000_000.5,)], [(2_000_000.5 - 1e-9,)], True),
        ([(2_000_000.5,)], [(2_000_001,)], False),
        ([(2_000_000.5,)], [(2_000_000.25,)], False),
        ([(2**40 + 1,)], [(2**40,)], False),
        ([(2e-10,)], [(3e-10,)], False),
        ([(1.0001,)], [(1.0,)], False),
        ([(0.3, "a"), (0.3, "b")], [(0.1 + 0.2, "b"), (0.3, "a")], True),
        ([("3",)], [(3,)], False),
        ([(None,)], [(0,)], False),
        ([(None,)], [("",)], False),
        ([(None,)], [(None,)], True),
        ([(math.inf,)], [(-math.inf,)], False),
        ([(1,), (1,)], [(1,)], False),
        ([(1,), (1,), (2,)], [(1,), (2,), (2,)], False),
        ([(1, 2)], [(2, 1)], False),
        ([(1, None)], [(1,)], False),
        ([], [], True),
    ],
)
def test_equal_results_by_hand(predicted, gold, same):
    assert same_result(predicted, gold, ordered=False) is same


def record(sql, ordered=False):
    """A record as the judge reads it."""
    return {"output": sql, "ordered": ordered}


def test_a_lucky_value_is_wrong_on_another_database(databases):
    gold = record("SELECT name FROM star WHERE magnitude < 0.1 OR name = 'Deneb'")
    lucky = "SELECT name FROM star WHERE magnitude < 0.5 OR name = 'Deneb'"
    assert judge(lucky, gold, databases[:1]).right
    assert judge(lucky, gold, databases) == (False, "2 rows, not 1")


@pytest.mark.parametrize(
    ("sql", "ordered", "verdict"),
    [
        ("SELECT name AS n FROM star ORDER BY id", True, (True, "same result")),
        ("SELECT name FROM star ORDER BY id DESC", False, (True, "same result")),
        ("SELECT name FROM star ORDER BY id DESC", True, (False, "wrong order")),
        ("SELECT lower(name) FROM star", False, (False, "other values")),
        ("SELECT name, id FROM star", False, (False, "2 columns, not 1")),
        ("SELECT name FROM star LIMIT 1", False, (False, "1 rows, not 4")),
        ("SELECT colour FROM star", False, (False, "error: no such column: colour")),
        ("", False, (False, "error: no statement: the text is empty")),
    ],
)
def test_verdicts_say_why(sql, ordered, verdict, databases):
    gold = record("SELECT name FROM star ORDER BY id", ordered)
    assert judge(sql, gold, databases) == verdict


@pytest.mark.parametrize("sql", ["SELECT colour FROM star", "SELECT 1 WHERE 1 = 0"])
def test_a_record_that_cannot_judge_is_refused(sql, databases):
    with pytest.raises(ValueError, match="fix the record"):
        judge("SELECT 1", record(sql), databases)


@pytest.mark.parametrize(
    "text, wanted",
    [
        (
            "<think>\nI could SELECT all.\n</think>\n\nSELECT a FROM t",
            "SELECT a FROM t",
        ),
        ("SELECT a -- one; two\nFROM t; more", "SELECT a -- one; two\nFROM t"),
        ("SELECT a /* one; two */ FROM t;", "SELECT a /* one; two */ FROM t"),
        ("SELECT [a;b] FROM t;", "SELECT [a;b] FROM t"),
    ],
)
def test_thoughts_and_comments_do_not_cut_a_statement(text, wanted):
    assert extract_sql(text) == wanted


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
def test_an_interrupt_of_a_query_is_raised():
    database = sqlite3.connect(":memory:")
    slow = "WITH RECURSIVE n(i) AS (VALUES(1) UNION ALL SELECT i + 1 FROM n) SELECT "
    slow += "count(*) FROM n WHERE i > 0"

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_sql(slow, database, max_seconds=60)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
