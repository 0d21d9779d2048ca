"""The tables and figures of 07: merges against the model that was trained."""

import pandas

from qlora_helpers import plots, score

KINDS = (
    "fp32",
    "bf16",
    "fp16",
    "Q8_0",
    "Q5_1",
    "Q4_1",
    "Q4_0",
    "nf4",
)  # most bits first


def against_trained(rows) -> pandas.DataFrame:
    """The judged rows of `data/measured/merge.json`, each paired with its reference.

    The reference is the row of the same run that is not merged and runs on the base
    that it was trained on. Adds the columns lost, gained and p of `score.paired_test`,
    and sorts by base and by format.
    """
    judged = [row for row in rows if "verdicts" in row and row["strength"] == 1]
    judged.sort(key=lambda row: (row["into"], KINDS.index(row["kind"])))
    trained = {
        row["run"]: row["verdicts"]
        for row in judged
        if (row["into"], row["kind"]) == ("none", row.get("trained_on", "nf4"))
    }
    tests = [score.paired_test(trained[row["run"]], row["verdicts"]) for row in judged]
    return pandas.DataFrame(judged).join(pandas.DataFrame(tests))


def lost_and_gained(labels, lost, gained, title, asked) -> None:
    """Show a bar to the left for the answers lost, and one to the right for those won.

    labels: a name for each pair of bars, from the top, as "base, format"; a new base
    stands apart. asked: the number of questions.
    """
    height = 1.3 + 0.3 * len(labels)
    fig, ax = plots.figure(size=(6.4, height))
    bases = [label.split(",")[0] for label in labels]
    gaps = [bases[i] != bases[max(0, i - 1)] for i in range(len(bases))]
    places = [-i - 0.6 * sum(gaps[: i + 1]) for i in range(len(labels))]  # downwards
    for sign, counts, name in ((-1, lost, "lost"), (1, gained, "gained")):
        colour = plots.COLOURS[1 if sign < 0 else 0]
        ends = [sign * count for count in counts]
        bars = ax.barh(places, ends, color=colour)
        ax.bar_label(bars, [f"{count}" for count in counts], padding=3)
        beside = ax.get_xaxis_transform()  # x in answers, y in parts of the height
        side = "right" if sign < 0 else "left"
        ax.text(0, 1.01, f" {name} ", color=colour, ha=side, transform=beside)
    ax.axvline(0, color=plots.COLOURS[5], linewidth=1, linestyle="-")
    ax.set_yticks(places, labels)
    ax.margins(x=0.12)
    ax.grid(visible=False, axis="y")
    ax.xaxis.set_major_formatter(lambda value, _: f"{abs(value):.0f}")
    ax.set_xlabel(f"right answers lost or gained, of {asked} questions")
    ax.set_title(title, pad=16)
    ax.set_ylabel("base, format")
    said = [
        f"{name}: {less} lost, {more} gained"
        for name, less, more in zip(labels, lost, gained, strict=True)
    ]
    plots.show(fig, alt=f"Against the trained model, of {asked}: {'; '.join(said)}")


def kept_by_change(wanted, kept, title, groups=40) -> None:
    """Show what weights of a similar change keep of it: mean, and mean +- one sigma.

    wanted: the adapter's change, (out, in). kept: what each base keeps, {label: (out,
    in)}, all in the same unit.
    """
    fig, axes = plots.figure(1, len(kept), size=(6.4, 3.2))
    order = wanted.flatten().argsort().tensor_split(groups)
    x = [1e3 * wanted.flatten()[part].mean().item() for part in order]
    for ax, (label, got) in zip(axes, kept.items(), strict=True):
        parts = [1e3 * got.flatten()[part].float() for part in order]
        mean = [part.mean().item() for part in parts]
        sigma = [part.std().item() for part in parts]
        low = [m - s for m, s in zip(mean, sigma, strict=True)]
        high = [m + s for m, s in zip(mean, sigma, strict=True)]
        ax.fill_between(x, low, high, color=plots.COLOURS[0], alpha=0.2, linewidth=0,
                        label="± 1 standard deviation")  # fmt: skip
        ax.plot(x, mean, color=plots.COLOURS[0], linestyle="-", label="mean kept")
        ax.plot(x, x, color=plots.COLOURS[5], linestyle="--", label="all of it")
        ax.set_title(label)
        ax.set_xlabel("change wanted (thousandths)")
    axes[0].set_ylabel("change kept (thousandths)")
    limit = max(abs(end) for ax in axes for end in ax.get_ylim())
    for ax in axes:
        ax.set_ylim(-limit, limit)
    axes[-1].tick_params(labelleft=False)
    axes[-1].legend(frameon=False, loc="upper left")
    fig.suptitle(title, x=0.02, ha="left", fontsize=12)
    plots.show(fig, alt=f"{title}. In each panel, the change kept against the change "
               "wanted: the mean, a band of one standard deviation, and the line where "
               "all of the change is kept")  # fmt: skip
