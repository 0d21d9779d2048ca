"""The figure style: units on axes, labels at lines' ends, alt text, small pictures."""

import base64
import io
import re

import matplotlib
import matplotlib.pyplot as plt
from IPython import display
from IPython.core.interactiveshell import InteractiveShell
from PIL import Image

# Each has 3:1 contrast on white, and its own dash (lines) and marker
# (points: marker=plots.MARKERS[i]), so that colour never says it alone.
COLOURS = ("#0063A6", "#C2410C", "#00795C", "#A3268C", "#7A6000", "#4D4D4D")
DASHES = (
    "-",
    (0, (6, 2)),
    (0, (2, 1.5)),
    (0, (7, 2, 2, 2)),
    (0, (4, 1.5)),
    (0, (1, 1)),
)
MARKERS = ("o", "s", "^", "D", "v", "X")

STYLE = {
    "axes.prop_cycle": plt.cycler(color=COLOURS, linestyle=DASHES),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.7,
    "font.size": 10,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "figure.facecolor": "white",
}
DPI = 100


def figure(rows=1, columns=1, size=(6.4, 3.4)):
    """A figure in the course's style: matplotlib's (fig, ax), ax an array if several.

    `size` is (width, height) in inches; 6.4 is the width of a text column.
    """
    matplotlib.rcParams.update(STYLE)  # for good: lines and titles come later
    fig, axes = plt.subplots(rows, columns, figsize=size, layout="constrained")
    plt.close(fig)  # out of pyplot's list: shown by show(), and once
    return fig, axes


def label_ends(ax, gap=13) -> None:
    """Write each line's label at its right end, in its colour, instead of a legend.

    `gap` is the least distance between two labels in points. Lines without a label are
    left alone. Call it last: the axes' limits must be final.
    """
    ends = []
    for line in ax.get_lines():
        if line.get_label().startswith("_"):
            continue
        x, y = line.get_xydata()[-1]
        ends.append((ax.transData.transform((x, y))[1], x, y, line))
    ends.sort(key=lambda end: end[0])
    points = 72 / ax.figure.dpi  # pixels to points
    clusters = []  # of neighbours that would overlap: [first height, number]
    for pixel, *_ in ends:
        clusters.append([pixel * points, 1])
        while len(clusters) > 1 and (
            clusters[-1][0] < clusters[-2][0] + clusters[-2][1] * gap
        ):  # one cluster, around the middle of both
            first, n = clusters.pop()
            before, m = clusters[-1]
            middle = m * (before + (m - 1) * gap / 2) + n * (first + (n - 1) * gap / 2)
            clusters[-1] = [middle / (m + n) - (m + n - 1) * gap / 2, m + n]
    heights = [first + i * gap for first, n in clusters for i in range(n)]
    for height, (pixel, x, y, line) in zip(heights, ends, strict=True):
        ax.annotate(
            line.get_label(),
            (x, y),
            xytext=(7, height - pixel * points),
            textcoords="offset points",
            color=line.get_color(),
            va="center",
            annotation_clip=False,
        )


def show(fig, alt) -> None:
    """Display a figure as a small PNG with its alt text, and close it.

    Raises ValueError for an empty alt text, a figure without a title, an axis whose
    label names no unit ("loss (nat per token)", "layer (no unit)"), or bars that do
    not start from zero.
    """
    redraw(fig, alt, handle=False)


def redraw(fig, alt, handle=None):
    """Display a figure that grows: in place of the one before, if given its handle.

    Returns the handle for the next call. Raises as `show` does.
    """
    if not isinstance(alt, str) or len(alt.split()) < 4:
        raise ValueError(
            f"alt is {alt!r}: say in a sentence what the figure shows, for those who "
            "cannot see it"
        )
    _check(fig)
    png = io.BytesIO()
    fig.savefig(png, dpi=DPI, bbox_inches="tight")
    plt.close(fig)
    with Image.open(png) as picture:  # a palette: a third of the bytes
        small = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    png = io.BytesIO()  # and no software version: the same figure, the same bytes
    small.save(png, "PNG", optimize=True)
    if not InteractiveShell.initialized():  # a script: nothing can show a picture
        if handle is False:
            print(f"Figure: {alt}")
        return None
    picture = base64.b64encode(png.getvalue()).decode()
    data = {"image/png": picture, "text/plain": f"Figure: {alt}"}
    metadata = {"image/png": {"alt": alt}}
    if handle:
        handle.update(data, metadata=metadata, raw=True)
        return handle
    as_new = {"display_id": True} if handle is None else {}
    return display.display(data, metadata=metadata, raw=True, **as_new)


def _check(fig) -> None:
    fig.canvas.draw()  # tick labels exist only once they are drawn
    titles = [ax.get_title(where) for ax in fig.axes for where in ("left", "center")]
    if not any(titles) and not fig.get_suptitle():
        raise ValueError("the figure has no title: say in it what to see")
    for ax in fig.axes:
        if not ax.axison or not ax.get_visible():
            continue
        for name, axis in (("x", ax.xaxis), ("y", ax.yaxis)):
            label = axis.get_label_text()
            if _is_read(axis) and not re.search(r"\([^()]+\)$", label.strip()):
                raise ValueError(
                    f"the {name} axis is labelled {label!r}: end it with its unit, "
                    'such as "loss (nat per token)" or "layer (no unit)"'
                )
        for bars in ax.containers:
            upright = getattr(bars, "orientation", None)
            if upright is None:  # whiskers and stems
                continue
            low, high = ax.get_ylim() if upright == "vertical" else ax.get_xlim()
            if not min(low, high) <= 0 <= max(low, high):
                raise ValueError(
                    f"bars are drawn from {low:g}: a bar's length is its value, so let "
                    "the axis start from zero, or draw points"
                )


def _is_read(axis) -> bool:
    """True where the axis shows ticks with text, so that a reader needs its unit."""
    ticks = axis.get_ticklabels()
    return axis.get_visible() and any(
        tick.get_visible() and tick.get_text() for tick in ticks
    )
