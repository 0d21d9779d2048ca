"""Predictions and claims: each meets its measurement on one printed line."""

import datetime
import json
import math
import numbers
import os
import pathlib
import re

from qlora_helpers import env

# The learner's own guesses; QLORA_JOURNAL moves the file, empty means: keep none.
JOURNAL = env.ROOT / "my_course" / "journal.jsonl"


def compare(id, predicted, measured, unit="", digits=3, by="measured") -> None:
    """Print a predicted number, the measured one, and their ratio.

    `predicted` is `...` as long as there is no guess. Both numbers may be a Python
    number, a numpy scalar or a tensor of one element; `digits` are significant ones.
    `by` says how the second was found, where it was not measured ("rehearsed").

    Raises ValueError for an id that is not like "02.bits", TypeError for no number.
    """
    _check_id(id)
    measured = _number(id, "measured", measured)
    unit = f" {unit}" if unit else ""
    shown = f"{by} {_text(measured, digits)}{unit}"
    if predicted is ...:
        print(f"{id}: no prediction yet, {shown}")
        _write(id, "compare", predicted=None, measured=measured, unit=unit.strip())
        return
    predicted = _number(id, "predicted", predicted)
    ratio = f"ratio {_text(predicted / measured, digits)}" if measured else "no ratio"
    print(f"{id}: predicted {_text(predicted, digits)}{unit}, {shown}, {ratio}")
    _write(id, "compare", predicted=predicted, measured=measured, unit=unit.strip())


def choose(id, predicted, answer, options, by="measurement") -> None:
    """Print whether the chosen option is the one that the measurement shows.

    `options` is a list (its letters are a, b, c, ...) or a dict from letter to text;
    `predicted` is one of the letters, or `...` as long as there is no guess. `by` says
    what shows the answer, where it is no measurement ("rehearsal").

    Raises ValueError for an id that is not like "02.saves" or a letter that is not
    among the options.
    """
    _check_id(id)
    if not isinstance(options, dict):
        options = {chr(ord("a") + i): text for i, text in enumerate(options)}
    for name, letter in (("predicted", predicted), ("answer", answer)):
        blank = name == "predicted" and letter is ...
        if not blank and letter not in list(options):
            raise ValueError(
                f"{id}: {name} is {letter!r}, expected one of "
                f"{', '.join(map(repr, options))}"
                + (", or ... for no guess yet" if name == "predicted" else "")
            )
    shown = f"the {by} shows {answer} ({options[answer]})"
    if predicted is ...:
        print(f"{id}: no prediction yet, {shown}")
        _write(id, "choose", predicted=None, measured=answer)
        return
    verdict = "as predicted" if predicted == answer else "not as predicted"
    print(f"{id}: predicted {predicted} ({options[predicted]}), {shown}: {verdict}")
    _write(id, "choose", predicted=predicted, measured=answer)


def holds(id, claim, text) -> None:
    """Print whether a claim of the lesson holds on this machine; the run goes on.

    Raises ValueError for an id that is not like "06.better", TypeError for a claim
    that is neither True nor False.
    """
    _check_id(id)
    if type(claim).__name__ not in ("bool", "bool_"):  # numpy's bool goes by `bool_`
        claim = claim.item() if hasattr(claim, "item") else claim
        if not isinstance(claim, bool):
            raise TypeError(
                f"{id}: the claim is {claim!r}, expected True or False: "
                "give a comparison such as after > before"
            )
    print(f"{id}: {'holds' if claim else 'DOES NOT HOLD here'}: {text}")
    _write(id, "holds", measured=bool(claim))


def say(text) -> None:
    """Show a sentence about results: as prose in a notebook, printed in a script.

    `text` is markdown. Make it from the variables of the cell, so that a number in it
    is always the one that was measured in the same run.
    """
    from IPython import get_ipython  # slow to import, and a script does not need it

    if get_ipython() is None:
        print(text)
        return
    from IPython.display import Markdown, display

    display(Markdown(text))


def journal() -> list[dict]:
    """The comparisons made so far on this machine, oldest first; [] if there are none.

    Each row has time (UTC), id, kind ("compare", "choose" or "holds") and measured;
    predicted (None if blank) and unit where there is one.
    """
    rows = []
    file = journal_file()
    if file is None or not file.exists():
        return rows
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # a line cut short by a crash
            continue
    return rows


def _check_id(id) -> None:
    if not isinstance(id, str) or not re.fullmatch(r"\d\d\.[a-z0-9_]+", id):
        raise ValueError(
            f"id {id!r}: expected the notebook's two digits, a dot and a name in "
            'lower case, such as "02.bits"'
        )


def _number(id, name, value) -> float:
    given = value
    if not isinstance(value, numbers.Real) and hasattr(value, "item"):
        try:
            value = value.item()
        except (ValueError, RuntimeError):  # more than one element
            value = None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        blank = ", or ... for no guess yet" if name == "predicted" else ""
        raise TypeError(
            f"{id}: {name} is {given!r} ({type(given).__name__}), "
            f"expected one number such as 4.5{blank}"
        )
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _text(value, digits) -> str:
    """`value` to `digits` significant digits, integers in full: 4.5, 134,515,008."""
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if not 1e-4 <= abs(value) < 1e15:
        return f"{value:.{digits}g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def journal_file() -> pathlib.Path | None:
    """The file that the comparisons go to; None if no journal is kept."""
    moved = os.environ.get("QLORA_JOURNAL")
    if moved is not None:
        return pathlib.Path(moved) if moved else None
    # installed as a package, there is no course around it to keep a journal in
    return JOURNAL if (env.ROOT / "notebooks").is_dir() else None


def _write(id, kind, **row) -> None:
    file = journal_file()
    if file is None:
        return
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    line = json.dumps({"time": now, "id": id, "kind": kind, **row}, ensure_ascii=False)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as out:
            out.write(line + "\n")  # one write, so that lines of two kernels do not mix
    except OSError:  # a full or read-only disk stops no lesson
        pass
