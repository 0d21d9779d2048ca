"""The comparison of notebooks catches drift, and survives a kernel that dies."""

import os
import re
import shutil
import subprocess
import sys
import time

import nbformat
import pytest

from qlora_helpers import env
from tools import course

CALM = """import logging, sys
from IPython.display import display
print("ready: Python 3.11")
print(object())
logging.warning("library chatter")
bar = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "0%"}
display(bar, raw=True)
"a value that is hidden";"""


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """Three notebooks, run by pytest as `make test` runs the course's."""
    root = tmp_path_factory.mktemp("course")
    notebooks = root / "notebooks"
    notebooks.mkdir()
    (root / "tests").mkdir()
    shutil.copy(env.ROOT / "tests" / "nbval_sanitize.cfg", root / "tests")
    wiring = (env.ROOT / "tests" / "conftest.py").read_text(encoding="utf-8")
    assert "SIGN_OF_LIFE = 60" in wiring
    wiring = wiring.replace("SIGN_OF_LIFE = 60", "SIGN_OF_LIFE = 2")
    (root / "tests" / "conftest.py").write_text(wiring, encoding="utf-8")
    shutil.copy(env.ROOT / "pyproject.toml", root)

    def write(name, *sources):
        cells = [nbformat.v4.new_code_cell(source) for source in sources]
        notebook = nbformat.v4.new_notebook(cells=cells)
        (notebooks / name).write_text(nbformat.writes(notebook), encoding="utf-8")

    write("calm.ipynb", CALM)
    write("drift.ipynb", "x = 4.5\nprint(x)", "print('same')")
    for name in ("calm", "drift"):
        path = notebooks / f"{name}.ipynb"
        ran = course.clean(course.execute(path))
        stored = ran.cells[0].outputs[0]
        stored.text = stored.text.replace("4.5", "4.6").replace("3.11", "3.12")
        path.write_text(nbformat.writes(ran), encoding="utf-8")
    write("dead.ipynb", "print(1)", "import os\nos._exit(1)", "print(3)")

    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "--color=no", "notebooks", "tests"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(env.ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.stdout, time.monotonic() - start, done.stderr


def results(text, name):
    found = re.findall(rf"{name}\W+ipynb::Cell (\d) (\w+)", text.split("FAILURES")[0])
    return [verdict for _, verdict in sorted(found)]


def test_what_no_result_depends_on_is_not_compared(outcome):
    assert results(outcome[0], "calm") == ["PASSED"]


def test_a_changed_number_fails(outcome):
    assert results(outcome[0], "drift") == ["FAILED", "PASSED"]
    assert "4.6" in outcome[0]


def test_a_dead_kernel_fails_its_cell_soon_and_by_name(outcome):
    text, seconds, _ = outcome
    assert results(text, "dead") == ["PASSED", "FAILED", "FAILED"]
    assert "the kernel died in this cell" in text
    assert seconds < 120


def test_a_long_cell_gives_signs_of_life(outcome):
    assert "dead.ipynb::Cell 1: 2 s so far" in outcome[2]
