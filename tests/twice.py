"""Run a notebook's cells again, each twice and after an interrupt: what is different?

    python tests/twice.py NOTEBOOK SETTINGS REPORT

SETTINGS is Python that shrinks the notebook's settings. REPORT is the file that gets a
line for every difference. QLORA_CACHE leads to a tiny Llama and a short text.
"""

import ast
import difflib
import math
import os
import pathlib
import re
import symtable
import sys

import nbformat
import rules
import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from peft import PeftModel

from qlora_helpers import env, records, score

CHECKED = re.compile(r"\d\d\.[a-z0-9_]+: ")  # a line that check.* prints
TRAIN, OTHERS, TOKENS = 40, 16, 4  # rows, rows, new tokens
REACHED = 0.7  # share of a cell's forward passes after which it is interrupted
CONFIG = (env.ROOT / "tests" / "nbval_sanitize.cfg").read_text(encoding="utf-8")
SANITIZE = re.findall(r"(?m)^regex: (.+)\nreplace: (.+)$", CONFIG)

calls = {"made": 0, "last": None}  # a model's forward passes in the cell that runs
loads = {}  # records.load of all rows, and of some: shrink fills it
look_up = torch.nn.Embedding.forward


def counted(layer, ids):
    """Look up the tokens, as each forward pass does first, or interrupt the cell."""
    calls["made"] += 1
    if calls["made"] == calls["last"]:
        raise KeyboardInterrupt
    return look_up(layer, ids)


def shrink() -> None:
    """Give the notebook little data, and let models write few tokens."""
    load, path = records.load, env.path
    loads[True] = load  # for a cell that reads a recording of all questions
    loads[False] = lambda split: load(split)[: TRAIN if split == "train" else OTHERS]
    records.load = loads[False]
    score.generate_answers.__defaults__ = 64, TOKENS
    score.generation_speed.__defaults__ = 8, TOKENS
    prose = env.cache_dir() / "prose.txt"  # a short one
    env.path = lambda name: prose if name == "data/prose.txt" else path(name)


def bound(source):
    """Each name that a cell binds at its top level, with the statement that does."""
    found = {}
    for statement in ast.parse(source).body:
        text = ast.unparse(statement)
        for symbol in symtable.symtable(text, "cell", "exec").get_symbols():
            if symbol.is_imported():
                found.setdefault(symbol.get_name(), "import")
            elif symbol.is_assigned() and not text.endswith("= None"):  # emptied
                found.setdefault(symbol.get_name(), text)
    return found


def read(source):
    """Each name of the notebook that a cell reads, its functions too."""
    whole = symtable.symtable(source, "cell", "exec")
    found, tables = set(), [whole]
    for table in tables:
        tables += table.get_children()
        found |= {
            symbol.get_name()
            for symbol in table.get_symbols()
            if symbol.is_referenced() and (table is whole or symbol.is_global())
        }
    return found


def run(shell, cell, settings, last=None):
    """Run a cell: (how it ended, its error's kind or None, its forward passes).

    How it ended: what it said (where the output is not compared, its checks' lines),
    and what each model that it names has learned, as a sum over its adapters' B. The
    cell is interrupted at the forward pass `last`.
    """
    source = cell.source
    if rules.tagged(cell, "settings"):
        source += f"\n{settings}"
    source = re.sub(r"(max_(new_)?tokens=)\d+", rf"\g<1>{TOKENS}", source)
    calls.update(made=0, last=last)
    if loads:
        records.load = loads["# of the 300 questions" in source]
    with capture_output() as caught:
        ran = shell.run_cell(source)
    calls["last"] = None
    if error := ran.error_before_exec or ran.error_in_exec:
        return f"{error}", type(error).__name__, calls["made"]
    shown = "".join(str(o.data.get("text/plain", "")) for o in caught.outputs)
    said = caught.stdout + shown
    for regex, replace in SANITIZE:
        said = re.sub(regex, replace, said)
    if rules.tagged(cell, "nbval-ignore-output"):
        said = "\n".join(filter(CHECKED.match, said.splitlines()))
    for name in sorted(read(source) | bound(source).keys()):
        value = shell.user_ns.get(name)
        if isinstance(value, PeftModel) and value.device.type != "meta":
            learned = [p for n, p in value.named_parameters() if "lora_B" in n]
            said += f"\n{name} learned {sum(p.abs().sum() for p in learned).item()}"
    return said, None, calls["made"]


def differences(notebook, settings):
    """Run all cells in order, and then all again: yield a line for each difference.

    In the second round each cell runs, is interrupted if it runs a model, and runs once
    more. Every time it must end as it did in the first round.
    """
    shell, cells = InteractiveShell.instance(), rules.code_cells(notebook)
    once = [run(shell, cell, settings) for cell in cells]
    for number, (cell, first) in enumerate(zip(cells, once, strict=True), start=1):
        said, error, made = first
        if error and not rules.tagged(cell, "raises-exception"):
            yield f"code cell {number}: {error}: {said}"
            continue
        rounds = [("again", None), ("twice in a row", None)]
        if made:
            rounds.insert(1, ("interrupted", math.ceil(REACHED * made)))
        for when, last in rounds:
            found = run(shell, cell, settings, last)
            if found[1] != ("KeyboardInterrupt" if last else error):
                yield f"code cell {number}, {when}: {found[1]}: {found[0]}"
            elif not last and found[0] != said:
                lines = said.splitlines(), found[0].splitlines()
                changed = "\n".join(list(difflib.unified_diff(*lines, n=0))[3:9])
                yield f"code cell {number}, {when}:\n{changed}"


def main(path, settings, report) -> None:
    path = pathlib.Path(path)
    os.chdir(path.parent)
    shrink()
    torch.nn.Embedding.forward = counted
    notebook = nbformat.read(path, as_version=4)
    lines = list(differences(notebook, settings))
    pathlib.Path(report).write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
