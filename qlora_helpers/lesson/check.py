"""Predictions and claims: each meets its measurement on one printed line."""

import contextlib
import datetime
import json
import math
import os
import pathlib
import re
import string

from IPython import display, get_ipython

from qlora_helpers import env

# The learner's own guesses; QLORA_JOURNAL moves the file, empty means: keep none.
JOURNAL = env.ROOT / "my_course" / "journal.jsonl"


def compare(id, predicted, measured, unit="", digits=3, by="measured") -> None:
    """Print a predicted number, the measured one, and their ratio.

    `predicted` is `...` as long as there is no guess. Both may be a Python number, a
    numpy scalar or a tensor of one element; `digits` are significant ones. `by` says
    how the second was found, where it was not measured ("rehearsed").

    Raises ValueError for an id that is not like "02.bits", TypeError for no number.
    """
    measured = _number(id, "measured", measured)
    shown = f"{by} {_text(measured, digits)} {unit}".rstrip()
    if predicted is ...:
        guess, line = None, f"no prediction yet, {shown}"
    else:
        guess = _number(id, "predicted", predicted)
        given = f"predicted {_text(guess, digits)} {unit}".rstrip()
        ratio = f"ratio {_text(guess / measured, digits)}" if measured else "no ratio"
        line = f"{given}, {shown}, {ratio}"
    _tell(id, line, kind="compare", predicted=guess, measured=measured, unit=unit)


def choose(id, predicted, answer, options, by="measurement") -> None:
    """Print whether the chosen option is the one that the measurement shows.

    `options` is a list of texts, whose letters are a, b, c, ...; `predicted` is one of
    the letters, or `...` as long as there is no guess. `by` says what shows the answer,
    where it is no measurement ("rehearsal").

    Raises ValueError for an id that is not like "02.saves", or for another letter.
    """
    texts = dict(zip(string.ascii_lowercase, options, strict=False))
    if answer not in [*texts] or predicted not in [*texts, ...]:
        raise ValueError(
            f"{id}: answer is {answer!r} and predicted is {predicted!r}, expected one "
            f"of {', '.join(map(repr, texts))}, or ... for no guess yet"
        )
    shown = f"the {by} shows {answer} ({texts[answer]})"
    if predicted is ...:
        guess, line = None, f"no prediction yet, {shown}"
    else:
        guess = predicted
        verdict = "as predicted" if guess == answer else "not as predicted"
        line = f"predicted {guess} ({texts[guess]}), {shown}: {verdict}"
    _tell(id, line, kind="choose", predicted=guess, measured=answer)


def holds(id, claim, text) -> None:
    """Print whether a claim of the lesson holds on this machine; the run goes on.

    Raises ValueError for an id that is not like "06.better", TypeError for a claim
    that is neither True nor False.
    """
    claim = claim.item() if hasattr(claim, "item") else claim  # of numpy or torch
    if not isinstance(claim, bool):
        raise TypeError(
            f"{id}: the claim is {claim!r}, expected True or False: "
            "give a comparison such as after > before"
        )
    verdict = "holds" if claim else "DOES NOT HOLD here"
    _tell(id, f"{verdict}: {text}", kind="holds", measured=claim)


def say(text) -> None:
    """Show a sentence in markdown: as prose in a notebook, printed in a script.

    Make it from the variables of the cell, so that its numbers are those of this run.
    """
    if get_ipython() is None:
        print(text)
    else:
        display.display(display.Markdown(text))


def journal_file() -> pathlib.Path | None:
    """The file that the comparisons go to; None if no journal is kept."""
    # installed as a package, there is no course around it to keep a journal in
    usual = JOURNAL if (env.ROOT / "notebooks").is_dir() else ""
    file = os.environ.get("QLORA_JOURNAL", usual)
    return pathlib.Path(file) if file else None


def _tell(id, text, **row) -> None:
    """Print a line, and add its row to the journal, with the time (UTC) and the id."""
    if not isinstance(id, str) or not re.fullmatch(r"\d\d\.[a-z0-9_]+", id):
        raise ValueError(
            f"id {id!r}: expected the notebook's two digits, a dot and a name in "
            'lower case, such as "02.bits"'
        )
    print(f"{id}: {text}")
    if not (file := journal_file()):
        return
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    line = json.dumps({"time": now, "id": id, **row}, ensure_ascii=False)
    with contextlib.suppress(OSError):  # a full or read-only disk stops no lesson
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as out:
            out.write(line + "\n")  # one write, so that lines of two kernels do not mix


def _number(id, name, value) -> int | float:
    of_one = hasattr(value, "shape") and math.prod(value.shape) == 1  # torch or numpy
    number = value.item() if of_one else value
    if isinstance(number, bool) or not isinstance(number, int | float):
        blank = ", or ... for no guess yet" if name == "predicted" else ""
        raise TypeError(
            f"{id}: {name} is {value!r} ({type(value).__name__}), "
            f"expected one number such as 4.5{blank}"
        )
    return number


def _text(value, digits) -> str:
    """`value` to `digits` significant digits, integers in full: 4.5, 134,515,008."""
    if isinstance(value, int):
        return f"{value:,}"
    large = 10 ** (digits - 1) <= abs(value) < 1e15
    return f"{value:,.0f}" if large else f"{value:,.{digits}g}"
