"""Run a model's SQL where it can do no harm, and judge it by its result."""

import itertools
import math
import re
import reprlib
import sqlite3
import time
from typing import NamedTuple

import psutil

MAX_STEPS = 20_000_000  # SQLite instructions; the clock is only a second limit
MAX_MEMORY = 64 * 2**20  # bytes that one query may add to this process
CHECK_EVERY = 100  # SQLite instructions between two looks at the limits
MAX_PLACES = 24  # where a query with several WITH parts may name one of them
LIMITS = {  # what one statement may hold (bytes, or a count)
    sqlite3.SQLITE_LIMIT_LENGTH: 10_000,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 4_000,
    sqlite3.SQLITE_LIMIT_COLUMN: 50,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 50,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 20,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 100,
}
# Not here: what gives another answer each time (random), reaches outside
# (load_extension), or spends a second in one instruction (printf('%.*c', 1e9, 'a')).
FUNCTIONS = """
abs avg ceil ceiling char coalesce concat concat_ws count cume_dist current_date
current_time current_timestamp date datetime dense_rank exp first_value floor glob
group_concat hex ifnull iif instr julianday lag last_value lead length like ln log log10
log2 lower ltrim max min mod nth_value ntile nullif percent_rank pow power rank replace
round row_number rtrim sign sqrt strftime string_agg substr substring sum time total
trim trunc typeof unicode unixepoch upper
""".split()
TOKEN = re.compile(
    r"--[^\n]*|/\*.*?(?:\*/|\Z)|'[^']*'|\"[^\"]*\"|`[^`]*`|\[[^\]]*\]|\w+|\S", re.S
)
START = r"\b(?:SELECT|WITH\s+(?:RECURSIVE\s+)?\w+\s*(?:\([^)]*\)\s*)?AS)\b"
CLAUSES = "FROM|WHERE|GROUP|HAVING|ORDER|LIMIT|UNION|JOIN|LEFT|INNER"


class Result(NamedTuple):
    """What SQLite answered; `error` is None where it answered at all."""

    columns: list
    rows: list
    error: str | None


class Verdict(NamedTuple):
    """Whether a query is right, and the reason in words."""

    right: bool
    reason: str


def open_database(script: str) -> sqlite3.Connection:
    """Build a database in memory from the text of an SQL script; it is read-only."""
    database = sqlite3.connect(":memory:", isolation_level=None)
    database.executescript(script)
    database.execute("PRAGMA temp_store = MEMORY")  # a big sort makes no file either
    database.execute("PRAGMA query_only = ON")
    return database


def extract_sql(text: str) -> str:
    """Take the first SQL statement out of a model's answer, without fence or chatter.

    An answer without any SELECT comes back as it is (and fails when it is run).
    """
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.S)  # Qwen3's and R1's
    fence = re.search(r"```[a-zA-Z]*\s*\n(.*?)(?:```|\Z)", text, re.S)
    text = (fence.group(1) if fence else text).strip()
    # "You can select ...: SELECT name": a keyword in capitals is the likelier start.
    start = re.match(START, text, re.I) or re.search(START, text)
    start = start or re.search(START, text, re.I)
    if not start:
        return text
    quoted = text[: start.start()].endswith("`")
    text = text[start.start() :]
    if quoted:
        text = text.partition("`")[0]
    if not fence:  # a blank line ends it, unless the query goes on below
        more = f"{CLAUSES}|SELECT" if start.group().upper() != "SELECT" else CLAUSES
        goes_on = rf"\s*(?:{more}|{more.lower()})\b"
        text = re.split(rf"\n\s*\n(?!{goes_on})", text)[0]
    ends = (token.start() for token in TOKEN.finditer(text) if token.group() == ";")
    return text[: next(ends, None)].strip()


def _refuse(sql) -> str | None:
    """Say why a text is not worth giving to SQLite, or None."""
    if not isinstance(sql, str):
        return f"expected SQL as text, got {type(sql).__name__}"
    if len(sql) > LIMITS[sqlite3.SQLITE_LIMIT_SQL_LENGTH]:
        return f"the statement is too long: {len(sql):,} characters"
    tokens = [t.upper() for t in TOKEN.findall(sql) if t[:2] not in ("--", "/*")]
    if not tokens:
        return "no statement: the text is empty"
    if tokens[0] not in ("SELECT", "WITH", "VALUES"):
        return (
            "only a query may run (SELECT or WITH), but the text starts with "
            f"{tokens[0][:20]}"
        )
    # SQLite copies a WITH part to each place that names it, before it looks at any
    # limit. Eight parts that each name the one before three times make 3**8 copies;
    # no other use of 24 places makes more than 7,000.
    defines = ("(", "MATERIALIZED", "NOT")
    parts = sum(a == "AS" and b in defines for a, b in itertools.pairwise(tokens))
    places = sum(token in (",", "FROM", "JOIN", "IN") for token in tokens)
    if parts > 1 and places > MAX_PLACES:
        return "too many tables and columns for a query with several WITH parts"
    return None


def _allow(action, first, second, *_):
    """Admit only reading: SQLite asks this for each thing that a query does."""
    reads = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE)
    known = action == sqlite3.SQLITE_FUNCTION and second.lower() in FUNCTIONS
    return sqlite3.SQLITE_OK if action in reads or known else sqlite3.SQLITE_DENY


def run_sql(sql, database, max_rows=1000, max_seconds=5.0) -> Result:
    """Run one statement that a model wrote; it cannot write, read files or hang.

    Whatever `sql` holds, nothing is raised: the Result has an `error` instead.
    """
    if error := _refuse(sql):
        return Result([], [], error)
    process = psutil.Process()
    deadline = time.monotonic() + max_seconds
    most_memory = process.memory_info().rss + MAX_MEMORY
    looks, stopped_by = 0, None

    def over_the_limit():
        nonlocal looks, stopped_by
        looks += 1
        if looks * CHECK_EVERY > MAX_STEPS:
            stopped_by = f"stopped after {MAX_STEPS:,} steps"
        elif time.monotonic() > deadline:
            stopped_by = f"stopped after {max_seconds:g} s"
        elif looks % 20 == 0 and process.memory_info().rss > most_memory:
            stopped_by = f"stopped at {MAX_MEMORY // 2**20} MiB of memory"
        return stopped_by is not None

    before = {limit: database.setlimit(limit, most) for limit, most in LIMITS.items()}
    cursor = database.cursor()
    try:
        database.set_authorizer(_allow)
        database.set_progress_handler(over_the_limit, CHECK_EVERY)
        columns = [column[0] for column in cursor.execute(sql).description]
        rows = cursor.fetchmany(max_rows + 1)
        if len(rows) > max_rows:
            return Result([], [], f"more than {max_rows:,} rows")
        return Result(columns, rows, None)
    except (sqlite3.Error, sqlite3.Warning, ValueError, MemoryError) as error:
        code = getattr(error, "sqlite_errorcode", None)
        if code == sqlite3.SQLITE_INTERRUPT and not stopped_by:
            raise KeyboardInterrupt from None  # SQLite swallows one in over_the_limit
        return Result([], [], stopped_by or str(error) or type(error).__name__)
    finally:
        cursor.close()
        database.set_progress_handler(None, 0)
        database.set_authorizer(None)
        for limit, most in before.items():
            database.setlimit(limit, most)


def _same_row(predicted, gold) -> bool:
    return len(predicted) == len(gold) and all(map(_same_cell, predicted, gold))


def _same_cell(predicted, gold) -> bool:
    if {type(predicted), type(gold)} in ({float}, {int, float}):
        return math.isclose(predicted, gold, rel_tol=1e-9, abs_tol=1e-12)
    return predicted == gold


def same_result(predicted_rows, gold_rows, ordered) -> bool:
    """Whether two lists of rows are the same, in any order unless `ordered`.

    Whole numbers and text must be exact, other numbers equal to a relative 1e-9 or an
    absolute 1e-12; NULL equals NULL. It counts how often a row appears.
    """
    if len(predicted_rows) != len(gold_rows):
        return False
    if ordered:
        return all(map(_same_row, predicted_rows, gold_rows))
    left = list(gold_rows)
    for row in predicted_rows:
        twin = next((other for other in left if _same_row(row, other)), None)
        if twin is None:
            return False
        left.remove(twin)
    return True


def check_databases(databases) -> None:
    """Raise TypeError unless `databases` is a list of what `open_database` returns."""
    given = databases if isinstance(databases, list | tuple) else ()
    if not given or any(not isinstance(one, sqlite3.Connection) for one in given):
        raise TypeError(
            f"databases is {reprlib.repr(databases)}: give a list of one or more open "
            "databases, each from sql.open_database(script)"
        )


def judge(sql, record, databases) -> Verdict:
    """Whether `sql` gives what the record's own SQL gives, on every database.

    On one database, a wrong query can be right by luck. `record["ordered"]`: whether
    the order of the rows counts (by default not). Raises ValueError where the record's
    SQL fails, or finds nothing in any database.
    """
    check_databases(databases)
    golds = [run_sql(record["output"], database) for database in databases]
    fault = next((gold.error for gold in golds if gold.error), None)
    if not fault and not any(gold.rows for gold in golds):
        fault = "no rows in any database, so that an empty answer would do"
    if fault:
        raise ValueError(f"{record['output']!r} cannot judge: {fault}; fix the record")
    for gold, database in zip(golds, databases, strict=True):
        found = run_sql(sql, database)
        if found.error:
            return Verdict(False, f"error: {found.error}")
        for part in ("columns", "rows"):
            has, needs = len(getattr(found, part)), len(getattr(gold, part))
            if has != needs:
                return Verdict(False, f"{has} {part}, not {needs}")
        if not same_result(found.rows, gold.rows, record.get("ordered")):
            any_order = same_result(found.rows, gold.rows, ordered=False)
            return Verdict(False, "wrong order" if any_order else "other values")
    return Verdict(True, "same result")
