"""The figure style: units on axes, labels at lines' ends, alt text, small pictures."""

import base64
import io

import matplotlib
import matplotlib.pyplot as plt
from IPython import display
from IPython.core.interactiveshell import InteractiveShell
from matplotlib.container import BarContainer
from PIL import Image
from PIL.PngImagePlugin import PngInfo

# Each has 3:1 contrast on white, and its own dash (lines) and marker
# (points: marker=plots.MARKERS[i]), so that colour is never the only difference.
COLOURS = ("#0063A6", "#C2410C", "#00795C", "#A3268C", "#7A6000", "#4D4D4D")
DASHES = (
    "-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 2, 2)), (0, (4, 1.5)), (0, (1, 1))
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "X")

STYLE = {
    "font.size": 12,  # points at the size shown: read from the last row
    "axes.prop_cycle": plt.cycler(color=COLOURS, linestyle=DASHES),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}
DPI = 100
GAP = 15  # points between two labels at lines' ends, at least


def figure(rows=1, columns=1, size=(6.4, 3.4)):
    """A figure in the course's style: matplotlib's (fig, ax), ax an array if several.

    `size` is (width, height) in inches; 6.4 is the width of a text column.
    """
    matplotlib.rcParams.update(STYLE)  # for all that follows: lines come later
    fig, axes = plt.subplots(rows, columns, figsize=size, layout="constrained")
    plt.close(fig)  # so that only show() displays it
    return fig, axes


def label_ends(ax) -> None:
    """Write each line's label at its right end, in its colour, instead of a legend.

    Call it last, because the axes' limits must be final.
    """
    lines = [line for line in ax.get_lines() if not line.get_label().startswith("_")]

    def height(line):  # of its right end, in points
        pixels = ax.transData.transform(line.get_xydata()[-1])[1]
        return pixels * 72 / ax.figure.dpi

    lines.sort(key=height)
    heights = [height(line) for line in lines]
    # labels that overlap move apart, both by as much; adjustText (1.4) also moves them
    # sideways, each by another length, so that they no longer stand in one column
    for _ in range(100):
        for upper in range(1, len(heights)):
            overlap = max(0, heights[upper - 1] + GAP - heights[upper])
            heights[upper - 1] -= overlap / 2
            heights[upper] += overlap / 2
    for line, wanted in zip(lines, heights, strict=True):
        ax.annotate(
            line.get_label(),
            line.get_xydata()[-1],
            xytext=(7, wanted - height(line)),
            textcoords="offset points",
            color=line.get_color(),
            va="center",
            annotation_clip=False,
        )


def show(fig, alt) -> None:
    """Display a figure as a small PNG with its alt text, and close it.

    Raises ValueError for an alt text of under four words, a figure without a title, an
    axis with numbers and without a label, or bars that do not start from zero.
    """
    if redraw(fig, alt) is None:  # a script shows no picture
        print(f"Figure: {alt}")


def redraw(fig, alt, handle=None):
    """Display a figure that grows, in place of the one that `handle` belongs to.

    Returns the handle for the next call, in a script None. Raises as `show` does.
    """
    _check(fig, alt)
    small = png(fig)
    if not InteractiveShell.initialized():
        return None
    picture = base64.b64encode(small).decode()
    data = {"image/png": picture, "text/plain": f"Figure: {alt}"}
    metadata = {"image/png": {"alt": alt}}
    if handle is None:
        return display.display(data, metadata=metadata, raw=True, display_id=True)
    handle.update(data, metadata=metadata, raw=True)
    return handle


def png(fig, texts=None) -> bytes:
    """A figure as the bytes of a small PNG, and close it; `texts` are kept inside it.

    `texts` is {name: text}, for the PNG's text chunks.
    """
    drawn, small = io.BytesIO(), io.BytesIO()
    fig.savefig(drawn, dpi=DPI, bbox_inches="tight")
    plt.close(fig)
    with Image.open(drawn) as picture:  # a palette makes a third of the bytes
        palette = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    inside = PngInfo()
    for name, text in (texts or {}).items():
        inside.add_text(name, text)
    # without matplotlib's version
    palette.save(small, "PNG", optimize=True, pnginfo=inside)
    return small.getvalue()


def _check(fig, alt) -> None:
    if len(str(alt).split()) < 4:
        raise ValueError(f"alt is {alt!r}: say in a sentence what the figure shows")
    fig.canvas.draw()  # tick labels exist only once they are drawn
    titles = [ax.get_title(where) for ax in fig.axes for where in ("left", "center")]
    if not any(titles) and not fig.get_suptitle():
        raise ValueError("the figure has no title: say in it what to see")
    for ax in fig.axes:
        if not ax.axison or not ax.get_visible():
            continue
        for axis in (ax.xaxis, ax.yaxis):
            ticks = axis.get_ticklabels() if axis.get_visible() else ()
            labelled = any(tick.get_visible() and tick.get_text() for tick in ticks)
            label = axis.get_label_text()
            if labelled and not label.strip():
                raise ValueError(
                    f"the {axis.axis_name} axis has no label: give one, with its unit "
                    'if it has one, such as "loss (nat per token)" or "layer"'
                )
        for bars in ax.containers:
            if not isinstance(bars, BarContainer):  # whiskers may start anywhere
                continue
            upright = bars.orientation == "vertical"
            low, high = sorted(ax.get_ylim() if upright else ax.get_xlim())
            if not low <= 0 <= high:
                raise ValueError(
                    f"bars are drawn from {low:g}: let their axis start from zero, "
                    "because a bar's length is its value, or draw points"
                )
