"""Draw README's picture from the outputs of notebook 00: the answers before and after.

    python -m tools.course picture

The PNG holds a hash of what it was made from, and a test compares it, so that the
picture cannot be older than the outputs.
"""

import functools
import hashlib
import json
import pathlib
import re
import textwrap

import nbformat
from matplotlib.patches import FancyBboxPatch
from PIL import Image

from qlora_helpers import env, plots
from qlora_helpers.model_files import write_whole

SOURCE = env.ROOT / "notebooks" / "00_start_here.ipynb"
PICTURE = env.ROOT / "docs" / "before_after.png"
CELLS = "first-answers", "first-figure"  # ids of the cells whose printed text is read
PARTS = {  # what is read from that text, and how
    "question": r"(?m)^question: (.+)$",
    "wrong": r"(?s)\nwithout the adapter:\n(.+?)\n-> only a query may run",
    "sql": r"\nwith the adapter:\n(SELECT .+)\n",
    "rows": r"\nwith the adapter:\n.+\n((?:.+\n)+)",
    "before": r"(?m)^without the adapter: (\d+) of 100 right",
    "after": r"(?m)^with the adapter: (\d+) of 100 right",
}
MADE_FROM = "made_from"  # the name of the PNG's text that holds the hash
GREY = "#4D4D4D"


def main(source=SOURCE, picture=PICTURE) -> pathlib.Path:
    """Draw the picture and return its path. Raises ValueError as `read` does."""
    facts = read(source)
    png = plots.png(draw(facts), {MADE_FROM: made_from(facts)})
    write_whole(picture, png)
    return picture


def read(source=SOURCE) -> dict[str, str]:
    """Return the parts of the picture, from the stored outputs of a notebook.

    Raises ValueError if the outputs lack a part.
    """
    cells = {cell.id: cell for cell in nbformat.read(source, as_version=4).cells}
    text = ""
    for id in CELLS:
        outputs = cells[id].outputs if id in cells else []
        text += "\n" + "".join(output.get("text", "") for output in outputs)
    facts = {}
    for part, pattern in PARTS.items():
        found = re.search(pattern, text)
        if not found:
            raise ValueError(
                f"the outputs of the cells {' and '.join(CELLS)} in {source.name} do "
                f"not show {part!r}, which the picture needs: run `make outputs "
                f"NOTEBOOKS={source.stem[:2]}`, or change PARTS in tools/picture.py"
            )
        facts[part] = found[1]
    return facts


def made_from(facts) -> str:
    """The SHA-256 of the facts that are drawn, and of the code that draws them."""
    code = pathlib.Path(__file__).read_text(encoding="utf-8")
    text = json.dumps([facts, code], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def stored_hash(picture=PICTURE) -> str | None:
    """What `made_from` gave when a picture was drawn; None if the PNG holds no hash."""
    with Image.open(picture) as image:
        return image.info.get(MADE_FROM)


def draw(facts):
    """Return the figure: the question, and below it a card for each of two answers."""
    fig, ax = plots.figure(size=(9, 4.4))
    ax.set(xlim=(0, 9), ylim=(0, 4.4))
    ax.axis("off")
    rows = [row.strip() for row in facts["rows"].splitlines()[1:]]
    write = functools.partial(ax.text, va="center", fontsize=14)
    write(
        0.1,
        4.15,
        "One question to SmolLM2-135M-Instruct, whose 4-bit weights are frozen:",
        color=GREY,
    )
    write(0.1, 3.75, facts["question"], fontsize=18, weight="bold")
    for left, title, returned, colour, count in (
        (0.1, "Without the adapter", "nothing, because this is no query", 1, "before"),
        (4.6, "With the adapter", ", ".join(rows), 0, "after"),
    ):
        colour, start = plots.COLOURS[colour], left + 0.25
        frame = FancyBboxPatch(
            (left, 0.1), 4.25, 3.2, boxstyle="round,pad=0,rounding_size=.1"
        )
        frame.set(facecolor="white", edgecolor=colour, linewidth=2)
        ax.add_patch(frame)
        write(start, 3.0, title, color=colour, fontsize=15, weight="bold")
        write(start, 1.55, "The database returns", color=GREY)
        write(start, 1.25, returned)
        write(start, 0.75, f"{facts[count]} of 100 answers are right", weight="bold")
        ax.barh(0.42, 3.75, 0.2, start, color="#E3E3E3")
        ax.barh(0.42, 3.75 * int(facts[count]) / 100, 0.2, start, color=colour)
    wrong = " ".join(facts["wrong"].split())
    wrong = textwrap.fill(wrong, 37, max_lines=3, placeholder=" ...")
    sql = re.sub(r" (?=WHERE)", "\n", facts["sql"])
    spaced = functools.partial(write, va="top", linespacing=1.4)
    spaced(0.35, 2.65, wrong, style="italic")
    spaced(4.85, 2.65, sql, family="monospace")
    return fig
