"""Plot guesses against measurements: one reader's, or those of a whole room.

    python -m tools.predictions                         this reader's own journal
    python -m tools.predictions FILE_OR_FOLDER [--out PNG]

The journal is what lesson/check.py writes. A folder holds a journal (*.jsonl) for each
reader, whose first guess for an id counts.
"""

import argparse
import io
import json
import math
import pathlib
import statistics
import sys

from qlora_helpers import env, plots
from qlora_helpers.lesson import check
from qlora_helpers.model_files import write_whole

OUT = env.ROOT / "build" / "predictions.png"
ROW = 0.34  # inches of height for each id
FARTHEST = 1e12  # a wrong unit is drawn, a slip of the finger is not
DAMAGED = "no row of a journal"  # why a line is left out


def main(path=None, out=None) -> pathlib.Path | None:
    """Plot a journal, or a folder of journals, and print one line for each id.

    path: by default this machine's journal. out: by default OUT. Returns the picture's
    path, or None if there is nothing to plot.
    """
    files = journals(path)
    guesses, left_out = read(files)
    for line in left_out:
        print(f"left out: {line}")
    if not guesses:
        print(
            f"There is nothing to plot, because no guess was found (journals read: "
            f"{len(files)}). Write a guess in place of ... in a notebook, and run its "
            "cell."
        )
        return None
    for line in lines(guesses):
        print(line)
    out = pathlib.Path(out or OUT)
    picture = io.BytesIO()
    draw(guesses, len(files)).savefig(picture, format="png", dpi=plots.DPI)
    write_whole(out, picture.getvalue())
    print(out)
    return out


def journals(path=None) -> list[pathlib.Path]:
    """Return the journal that `path` names, or those in the folder that it names.

    Raises FileNotFoundError if there is no such file or folder, or no journal in it.
    """
    given = path or check.journal_file()
    if given is None:
        raise FileNotFoundError("no journal is kept here: give a file or a folder")
    path = pathlib.Path(given)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: run a notebook's cells with predictions first, or "
            "give a journal or a folder of journals"
        )
    if not path.is_dir():
        return [path]
    if files := sorted(path.glob("*.jsonl")):
        return files
    raise FileNotFoundError(f"no file in {path} ends in .jsonl: give another folder")


def read(files) -> tuple[dict, list[str]]:
    """Return the guesses by id, in the course's order, and what was left out and why.

    A guess is a ratio (guess / measurement, a float) or whether a choice was right (a
    bool). Of each reader, the first guess counts that is not blank.
    """
    guesses, left_out = {}, []
    for file in files:
        seen = set()
        for number, row in rows(file):
            id, guess = _guess(row)
            if guess is None or id in seen:
                continue
            if id in guesses and not isinstance(guess, str | type(guesses[id][0])):
                guess = f"{id}: elsewhere it is a guess of another kind"
            if isinstance(guess, str):
                left_out.append(f"{file.name}, line {number}: {guess}")
            else:
                guesses.setdefault(id, []).append(guess)
            if guess != DAMAGED:
                seen.add(id)
    return dict(sorted(guesses.items())), left_out


def rows(file) -> list[tuple]:
    """Return each line's number and what it holds, None where it was cut short."""
    found = []
    text = file.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                found.append((number, json.loads(line)))
            except ValueError:
                found.append((number, None))
    return found


def _guess(row):
    """Return a row's id and guess: a float, a bool, None if blank, or why not."""
    if not isinstance(row, dict) or not isinstance(row.get("id"), str):
        return None, DAMAGED
    id, kind, guess = row["id"], row.get("kind"), row.get("predicted")
    if kind not in ("compare", "choose") or guess is None:
        return id, None
    measured = row.get("measured")
    if kind == "choose":
        if isinstance(guess, str) and isinstance(measured, str):
            return id, guess == measured
        return id, DAMAGED
    for name, value in (("guess", guess), ("measurement", measured)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            return id, DAMAGED
        if not 0 < value <= sys.float_info.max:
            return id, f"{id}: the {name} is {value}, which a log axis cannot show"
    ratio = guess / measured
    if not 1 / FARTHEST < ratio < FARTHEST:
        return id, f"{id}: the ratio is {ratio:.3g}, too far from 1 to be drawn"
    return id, ratio


def lines(guesses: dict) -> list[str]:
    """Return a line of text for each id."""
    found = []
    for id, given in guesses.items():
        if isinstance(given[0], bool):
            found.append(f"{id}: {sum(given)} of {len(given)} right")
        else:
            ratio = statistics.median(given)
            many = f"median of {len(given)} guesses: " if len(given) > 1 else ""
            found.append(f"{id}: {many}{ratio:.3g} x the measurement")
    return found


def draw(guesses: dict, readers: int):
    """Return the figure: numbers as ratios on a log axis, and choices below them."""
    numbers = {id: g for id, g in guesses.items() if not isinstance(g[0], bool)}
    choices = {id: g for id, g in guesses.items() if isinstance(g[0], bool)}
    parts = [part for part in (numbers, choices) if part]
    fig, axes = plots.figure(
        len(parts), size=(8, 1.1 * len(parts) + ROW * len(guesses) + 0.4)
    )
    fig.get_layout_engine().set(hspace=0.06)
    axes = list(axes) if len(parts) > 1 else [axes]
    heights = [len(part) + 2.2 for part in parts]
    axes[0].get_gridspec().set_height_ratios(heights)
    for ax, part in zip(axes, parts, strict=True):
        ax.set_yticks(range(len(part)), part, fontsize=12)
        ax.set_ylim(len(part) - 0.4, -0.6)  # the first id is at the top
        ax.tick_params(axis="x", labelsize=12)
        if part is numbers:
            _draw_numbers(ax, numbers, readers)
        else:
            _draw_choices(ax, choices, readers)
        ax.xaxis.label.set_fontsize(12)
    return fig


def _draw_numbers(ax, numbers, readers) -> None:
    """Draw a point for each guess, and with several readers a bar at the median."""
    room = readers > 1
    for y, ratios in enumerate(numbers.values()):
        ax.plot(
            ratios,
            [y] * len(ratios),
            linestyle="none",
            marker=plots.MARKERS[0],
            markersize=9,
            color=plots.COLOURS[0],
            alpha=0.45 if room else 1,
        )
        if room:
            middle = statistics.median(ratios)
            ax.plot([middle] * 2, [y - 0.35, y + 0.35], "-", color=plots.COLOURS[1])
            ax.lines[-1].set_linewidth(4)
    ax.set_xscale("log")
    farthest = max(abs(math.log10(r)) for ratios in numbers.values() for r in ratios)
    reach = 10 ** max(1.15 * farthest, 0.35)
    ax.set_xlim(1 / reach, reach)  # too low and too high have equal room
    if reach < 50:
        ticks = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)
        ax.set_xticks([tick for tick in ticks if 1 / reach < tick < reach])
        ax.set_xticks([], minor=True)
    ax.xaxis.set_major_formatter(lambda tick, _: f"{tick:g}")
    ax.axvline(1, color="black", linewidth=1.5, linestyle="-", zorder=1)
    ax.set_xlabel("guess / measurement (1 is exact)")
    title = "Guessed too low on the left, too high on the right"
    if room:
        title += f"\n{readers} readers; the bar is the median"
    ax.set_title(title, fontsize=14)


def _draw_choices(ax, choices, readers) -> None:
    """Draw right or wrong; with several readers, the share of those who were right."""
    if readers == 1:
        for y, (right, *_) in enumerate(choices.values()):
            style = 0 if right else 1
            ax.plot(
                [0 if right else 1],
                [y],
                marker=plots.MARKERS[style],
                markersize=10,
                color=plots.COLOURS[style],
            )
        ax.set_xticks([0, 1], ["right", "wrong"])
        ax.set_xlim(-0.5, 1.5)
        ax.set_title("Choices that were right, and wrong", fontsize=14)
        return
    shares = [100 * sum(given) / len(given) for given in choices.values()]
    ax.barh(range(len(shares)), shares, height=0.6, color=plots.COLOURS[0])
    for y, (share, given) in enumerate(zip(shares, choices.values(), strict=True)):
        ax.text(share + 1, y, f"{sum(given)} of {len(given)}", va="center", fontsize=12)
    ax.set_xlim(0, 115)
    ax.set_xticks(range(0, 101, 25))
    ax.set_xlabel("chose right (% of those who guessed)")
    ax.set_title("How many chose right", fontsize=14)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("path", nargs="?", help="a journal, or a folder of journals")
    parser.add_argument("--out", default=OUT, type=pathlib.Path)
    given = parser.parse_args()
    try:
        main(given.path, given.out)
    except FileNotFoundError as error:
        parser.exit(1, f"{error}\n")
