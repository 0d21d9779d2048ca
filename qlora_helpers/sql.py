"""Run a model's SQL where it can do no harm, and judge it by its result."""

import itertools
import math
import re
import reprlib
import sqlite3
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import psutil

MAX_STEPS = 20_000_000  # SQLite instructions: the same verdict on a slow machine
MAX_MEMORY = 64 * 2**20  # bytes that one query may add to this process
MAX_EXPANSION = 20_000  # copies of WITH bodies; SQLite writes them out while parsing
CHECK_EVERY = 100  # SQLite instructions between two looks at the limits
LIMITS = {  # what one statement may hold (bytes, or a count)
    sqlite3.SQLITE_LIMIT_LENGTH: 10_000,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 4_000,
    sqlite3.SQLITE_LIMIT_COLUMN: 50,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 50,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 20,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 100,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
}
# Not here: what gives another answer each time (random), reaches outside
# (load_extension), or spends a second in one instruction (printf('%.*c', 1e9, 'a')).
FUNCTIONS = (
    " abs avg ceil ceiling char coalesce concat concat_ws count cume_dist current_date "
    "current_time current_timestamp date datetime dense_rank exp first_value floor "
    "glob group_concat hex ifnull iif instr julianday lag last_value lead length like "
    "ln log log10 log2 lower ltrim max min mod nth_value ntile nullif percent_rank "
    "pow power rank replace round row_number rtrim sign sqrt strftime string_agg "
    "substr substring sum time total trim trunc typeof unicode unixepoch upper "
)
TOKEN = re.compile(
    r"--[^\n]*|/\*.*?(?:\*/|\Z)|'[^']*'|\"[^\"]*\"|`[^`]*`|\[[^\]]*\]|\w+|\S", re.S
)
START = r"\b(?:SELECT|WITH\s+(?:RECURSIVE\s+)?\w+\s*(?:\([^)]*\)\s*)?AS)\b"


class Result(NamedTuple):
    """What SQLite answered; `error` is None where it answered at all."""

    columns: list
    rows: list
    error: str | None


class Verdict(NamedTuple):
    """Whether a query is right, and the reason in words."""

    right: bool
    reason: str


def open_database(script):
    """Build a database in memory from an SQL script (its text, or a Path), and lock it.

    Returns an sqlite3.Connection: nothing is written to it, or to a file, any more.
    """
    if isinstance(script, Path):
        script = script.read_text(encoding="utf-8")
    database = sqlite3.connect(":memory:", isolation_level=None)
    database.executescript(script)
    database.execute("PRAGMA temp_store = MEMORY")  # a big sort makes no file either
    database.execute("PRAGMA query_only = ON")
    return database


def extract_sql(text):
    """Take the first SQL statement out of a model's answer, without fence or chatter.

    An answer without any SELECT comes back as it is (and fails when it is run).
    """
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.S)  # Qwen3's and R1's
    fence = re.search(r"```[a-zA-Z]*\s*\n(.*?)(?:```|\Z)", text, re.S)
    text = (fence.group(1) if fence else text).strip()
    # "You can select ...: SELECT name": a keyword in capitals is the likelier start.
    start = (
        re.match(START, text, re.I)
        or re.search(START, text)
        or re.search(START, text, re.I)
    )
    if not start:
        return text
    if text[: start.start()].endswith("`"):
        text = text[: (text + "`").index("`", start.end())]
    if not fence:
        text = text[: start.end()] + re.split(r"\n\s*\n", text[start.end() :])[0]
    semicolon = re.match(
        r"""(?>'[^']*'|"[^"]*"|\[[^]]*\]|--[^\n]*|/\*.*?\*/|[^;'"])*?;""",
        text[start.start() :],
        re.S,
    )
    return (semicolon.group()[:-1] if semicolon else text[start.start() :]).strip()


def _refuse(sql):
    """Say why a text is not worth giving to SQLite, or None."""
    if not isinstance(sql, str):
        return f"expected SQL as text, got {type(sql).__name__}"
    if len(sql) > LIMITS[sqlite3.SQLITE_LIMIT_SQL_LENGTH]:
        return f"the statement is too long: {len(sql):,} characters"
    tokens = [t.upper() for t in TOKEN.findall(sql) if t[:2] not in ("--", "/*")]
    if not tokens:
        return "no statement: the text is empty"
    if tokens[0] not in ("SELECT", "WITH", "VALUES"):
        return f"only a query may run (SELECT or WITH), not {tokens[0][:20]}"
    # WITH b AS (SELECT 1 FROM a, a), c AS (SELECT 1 FROM b, b) ...: copies double at
    # each step, before any limit is looked at. With k bodies and n places that may
    # name one, there are at most (n / k)^k copies (and most of all at k = n / e).
    defines = ("(", "MATERIALIZED", "NOT")
    bodies = sum(a == "AS" and b in defines for a, b in itertools.pairwise(tokens))
    places = sum(t in (",", "FROM", "JOIN", "IN") for t in tokens)
    bodies = min(bodies, places / math.e)
    if bodies and bodies * math.log(places / bodies) > math.log(MAX_EXPANSION):
        return "too many WITH parts that name each other"
    return None


def _allow(action, first, second, *_):
    """Admit reading alone: SQLite asks this for every single thing a query does."""
    reads = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE)
    known = action == sqlite3.SQLITE_FUNCTION and f" {second.lower()} " in FUNCTIONS
    return sqlite3.SQLITE_OK if action in reads or known else sqlite3.SQLITE_DENY


def run_sql(sql, database, max_rows=1000, max_seconds=5.0):
    """Run one statement that a model wrote; nothing it says can write, reach or hang.

    `database` comes from `open_database`. Returns a Result; never raises for what
    `sql` holds: that is its `error`.
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

    database.execute("PRAGMA query_only = ON")  # the authorizer forbids PRAGMA
    before = {limit: database.setlimit(limit, most) for limit, most in LIMITS.items()}
    cursor = database.cursor()
    try:
        database.set_authorizer(_allow)
        database.set_progress_handler(over_the_limit, CHECK_EVERY)
        columns = [column[0] for column in cursor.execute(sql).description]
        rows, held = [], 0
        for row in cursor:
            # counted, too: memory that was free already makes no process grow
            held += sum(len(cell) for cell in row if isinstance(cell, str | bytes))
            if held > MAX_MEMORY:
                return Result([], [], f"more than {MAX_MEMORY // 2**20} MiB of rows")
            if len(rows) == max_rows:
                return Result([], [], f"more than {max_rows:,} rows")
            rows.append(row)
        return Result(columns, rows, None)
    except (sqlite3.Error, sqlite3.Warning, ValueError, MemoryError) as error:
        return Result([], [], stopped_by or str(error) or type(error).__name__)
    finally:
        cursor.close()
        database.set_progress_handler(None, 0)
        database.set_authorizer(None)
        for limit, most in before.items():
            database.setlimit(limit, most)


def _cell(value):
    """Round a number to 20 bits (a relative 1e-6), so that 3 is 3.0 is 2.9999999."""
    if not isinstance(value, int | float) or math.isinf(value):
        return value
    if abs(value) >= 2**20:
        return round(value)
    mantissa, exponent = math.frexp(value)
    # An odd shift: no short decimal, half or third lies where rounding turns over.
    grid = round(mantissa * 2**20 + 0.2137)
    return math.ldexp(grid, exponent - 20) if abs(value) > 1e-9 else 0


def same_result(predicted_rows, gold_rows, ordered):
    """Whether two lists of rows are the same, in any order unless `ordered`.

    Numbers are equal to a relative 1e-6, NULL equals NULL, text must be exact; how
    often a row appears counts, and the names of columns do not.
    """
    predicted, gold = (
        [tuple(_cell(value) for value in row) for row in rows]
        for rows in (predicted_rows, gold_rows)
    )
    return predicted == gold if ordered else Counter(predicted) == Counter(gold)


def check_databases(databases) -> None:
    """Raise TypeError unless `databases` is a list of what `open_database` returns."""
    listed = isinstance(databases, list | tuple) and databases
    if not listed or any(not isinstance(d, sqlite3.Connection) for d in databases):
        raise TypeError(
            f"databases is {reprlib.repr(databases)}: give a list of one or more open "
            "databases, each from sql.open_database(script)"
        )


def judge(sql, record, databases):
    """Decide whether `sql` gives what the record's own SQL gives, on every database.

    Several databases with other contents: on one, a wrong query can be right by luck.
    A record's `ordered` says that the order of the rows counts; left out, it does not.
    Raises ValueError where the record's SQL fails, or finds nothing in any of them.
    """
    check_databases(databases)
    golds = [run_sql(record["output"], database) for database in databases]
    broken = next((gold.error for gold in golds if gold.error), None)
    if broken or not any(gold.rows for gold in golds):
        what = broken or "no rows in any database, so that an empty answer would do"
        raise ValueError(f"{record['output']!r} cannot judge: {what}; fix the record")
    for gold, database in zip(golds, databases, strict=True):
        found = run_sql(sql, database)
        if found.error:
            return Verdict(False, f"error: {found.error}")
        for what in ("columns", "rows"):
            has, needs = len(getattr(found, what)), len(getattr(gold, what))
            if has != needs:
                return Verdict(False, f"{has} {what}, not {needs}")
        if not same_result(found.rows, gold.rows, record.get("ordered")):
            any_order = same_result(found.rows, gold.rows, ordered=False)
            return Verdict(False, "wrong order" if any_order else "other values")
    return Verdict(True, "same result")
