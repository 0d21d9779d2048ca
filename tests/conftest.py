"""What every test run needs: nbval made safe, signs of life, and a sample notebook."""

import os
import pathlib
import sys
import threading
import time
from queue import Empty

import nbformat
import pytest
from nbval.kernel import RunningKernel
from nbval.plugin import IPyNbCell, IPyNbFile

from qlora_helpers import env

ROOT = pathlib.Path(__file__).resolve().parents[1]
WIDGET = "application/vnd.jupyter.widget-view+json"
POLL = 5  # seconds between two looks at whether the kernel lives
SIGN_OF_LIFE = 60  # seconds

# inherited by every kernel that a test starts
for name, value in env.QUIET.items():
    os.environ.setdefault(name, value)
os.environ["QLORA_JOURNAL"] = ""  # tests leave no guesses in a learner's journal


class Guard:
    """A plugin, since a conftest's own hooks do not see notebooks of other folders."""

    def __init__(self):
        self.terminal = os.dup(sys.__stderr__.fileno())  # as it is before capturing

    def pytest_collectstart(self, collector):
        if isinstance(collector, IPyNbFile):
            collector.skip_compare += ("stderr",)  # libraries' log lines

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        done = threading.Event()

        def beat():
            start = time.monotonic()
            while not done.wait(SIGN_OF_LIFE):
                line = f"\n{item.nodeid}: {time.monotonic() - start:.0f} s so far\n"
                os.write(self.terminal, line.encode())

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            return (yield)
        finally:
            done.set()
            thread.join()


def pytest_configure(config):
    config.pluginmanager.register(Guard(), "course-guard")
    RunningKernel.get_message = get_message
    IPyNbCell.compare_outputs = compare_outputs


wait_for_message = RunningKernel.get_message
compare_all = IPyNbCell.compare_outputs


def get_message(kernel, stream, timeout=None):
    """nbval's wait in slices: alone it sits out the timeout with a dead kernel."""
    end = float("inf") if timeout is None else time.monotonic() + timeout
    while True:
        left = max(0, min(POLL, end - time.monotonic()))
        try:
            return wait_for_message(kernel, stream, timeout=left)
        except Empty:
            if not kernel.is_alive():
                raise RuntimeError(
                    "the kernel died in this cell; most often the system ended it for "
                    "want of memory"
                ) from None
            if time.monotonic() >= end:
                raise


def compare_outputs(cell, test, ref, skip_compare=None):
    """nbval's comparison without progress bars, which are not stored either."""
    test = [output for output in test if WIDGET not in output.get("data", {})]
    if cell.cell.source.rstrip().endswith(";"):
        # the ";" hides a value by the history, and nbval's kernels keep none
        test = [out for out in test if out.get("output_type") != "execute_result"]
    return compare_all(cell, test, ref, skip_compare)


HEADER = """# 01 Is one and one two?

**Question** What does adding give?

**You will be able to** add, and say why.

**Before** nothing.

**Time** one minute to read; running time not measured.

**Needs** no memory to speak of; not measured.

**Downloads** 0 MB."""


@pytest.fixture
def sample():
    """A notebook that keeps every rule, as if `make outputs` had just written it."""
    new = nbformat.v4
    markdown, code = new.new_markdown_cell, new.new_code_cell
    picture = new.new_output(
        "display_data",
        {"image/png": "iVBORw0KGgo=", "text/plain": "Figure: two bars of one"},
        metadata={"image/png": {"alt": "Two bars of one, and one of two."}},
    )

    def stdout(text):
        return new.new_output("stream", name="stdout", text=text)

    cells = [
        markdown(HEADER),
        code("import json", metadata={"tags": ["setup"]}),
        code("ONE = 1  # no unit: a count", metadata={"tags": ["settings"]}),
        markdown("## What does adding give?\n\n**Prediction.** How much is 1 + 1?"),
        code("predicted = 3  # too many", metadata={"tags": ["prediction"]}),
        code(
            "from qlora_helpers.lesson import check\n\n"
            'check.compare("01.sum", predicted, ONE + ONE)',
            outputs=[stdout("01.sum: predicted 3, measured 2, ratio 1.5\n")],
        ),
        markdown("**What happened** It gives two.", metadata={"tags": ["reveal"]}),
        code('print("a figure")', outputs=[stdout("a figure\n"), picture]),
        markdown("The figure shows two bars of one and one of two."),
        markdown("## What we found\n\nOne and one is 2."),
        markdown("## Exercises"),
        code(
            "def add(a, b):\n    return ...\n\n\nexercises.check_add(add)",
            metadata={"tags": ["exercise"]},
            outputs=[stdout("add: not yet\n")],
        ),
        markdown(
            "<details><summary>Hint</summary>\n\nThink of +.\n\n</details>\n\n"
            "<details><summary>Solution</summary>\n\n```python\n"
            "def add(a, b):\n    return a + b\n```\n\n</details>",
            metadata={"tags": ["solution"]},
        ),
        markdown("## Next\n\n[The first again](01_sum.ipynb)"),
    ]
    notebook = new.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    notebook.metadata["language_info"] = {"name": "python"}
    from tools.course import output_hash

    counted = [cell for cell in cells if cell.cell_type == "code"]
    for count, cell in enumerate(counted, start=1):
        cell.execution_count = count
        cell.metadata["output_sha256"] = output_hash(cell)
    return notebook
