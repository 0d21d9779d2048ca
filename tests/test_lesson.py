"""Predictions meet measurements, and figures keep the style."""

import json
import os
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from qlora_helpers import plots
from qlora_helpers.lesson import check, merges, recordings
from tools import predictions

# ---- predictions and claims


@pytest.fixture
def journal(tmp_path, monkeypatch):
    file = tmp_path / "my_course" / "journal.jsonl"
    monkeypatch.setenv("QLORA_JOURNAL", str(file))
    return file


@pytest.mark.parametrize(
    "predicted, measured, unit, line",
    [
        (4, 4.5, "bit", "predicted 4 bit, measured 4.5 bit, ratio 0.889"),
        (..., 4.5, "bit", "no prediction yet, measured 4.5 bit"),
        (
            1e8,
            134_515_008,
            "",
            "predicted 100,000,000, measured 134,515,008, ratio 0.743",
        ),
        (1, torch.tensor(0.25), "", "predicted 1, measured 0.25, ratio 4"),
        (np.float32(0.5), np.int64(2), "", "predicted 0.5, measured 2, ratio 0.25"),
        (3, 0, "", "predicted 3, measured 0, no ratio"),
        (2, 1.5e-9, "s", "predicted 2 s, measured 1.5e-09 s, ratio 1,333,333,333"),
        (1, float("nan"), "", "predicted 1, measured nan, ratio nan"),
    ],
)
def test_compare_prints_one_line(predicted, measured, unit, line, capsys):
    check.compare("02.bits", predicted, measured, unit=unit)
    assert capsys.readouterr().out == f"02.bits: {line}\n"


@pytest.mark.parametrize(
    "digits, text", [(2, "1,235"), (4, "1,235"), (5, "1,234.6"), (6, "1,234.57")]
)
def test_digits_are_significant_ones(digits, text, capsys):
    check.compare("02.bits", ..., 1234.567, digits=digits)
    assert capsys.readouterr().out.endswith(f"measured {text}\n")


def test_what_was_not_measured_is_not_called_so(capsys):
    check.compare("04.kept", 1, 11.4, "GiB", by="rehearsed")
    check.choose("04.kbit", "a", "b", ["nothing", "more"], by="calculation")
    assert capsys.readouterr().out == (
        "04.kept: predicted 1 GiB, rehearsed 11.4 GiB, ratio 0.0877\n"
        "04.kbit: predicted a (nothing), the calculation shows b (more): "
        "not as predicted\n"
    )


@pytest.mark.parametrize("predicted", ["4", None, True, [4], torch.ones(2)])
def test_compare_refuses_what_is_no_number(predicted):
    with pytest.raises(TypeError, match=r"02\.bits: predicted is .* expected one num"):
        check.compare("02.bits", predicted, 4.5)


def test_compare_takes_no_blank_measurement():
    with pytest.raises(TypeError, match="measured is Ellipsis"):
        check.compare("02.bits", 4, ...)


@pytest.mark.parametrize("id", ["2.bits", "02.Bits", "bits", "02bits", 2, None])
def test_ids_are_stable_names(id):
    for call in (
        lambda: check.compare(id, 1, 1),
        lambda: check.choose(id, "a", "a", ["x"]),
        lambda: check.holds(id, True, "x"),
    ):
        with pytest.raises(ValueError, match=r'such as "02\.bits"'):
            call()


OPTIONS = ["half", "a tenth", "nothing"]


@pytest.mark.parametrize(
    "predicted, line",
    [
        ("b", "predicted b (a tenth), the measurement shows b (a tenth): as predicted"),
        (
            "a",
            "predicted a (half), the measurement shows b (a tenth): not as predicted",
        ),
        (..., "no prediction yet, the measurement shows b (a tenth)"),
    ],
)
def test_choose_prints_one_line(predicted, line, capsys):
    check.choose("02.saves", predicted, answer="b", options=OPTIONS)
    assert capsys.readouterr().out == f"02.saves: {line}\n"


@pytest.mark.parametrize("predicted", ["d", "A", "half", "", None, ["a"], 1])
def test_choose_refuses_other_letters(predicted):
    with pytest.raises(ValueError, match=r"expected one of 'a', 'b', 'c', or \.\.\."):
        check.choose("02.saves", predicted, answer="b", options=OPTIONS)


def test_choose_refuses_a_blank_answer():
    with pytest.raises(ValueError, match="answer is Ellipsis"):
        check.choose("02.saves", "a", answer=..., options=OPTIONS)


@pytest.mark.parametrize("yes", [True, np.bool_(True), torch.tensor(True)])
def test_holds_prints_on_every_machine_and_stops_none(yes, capsys):
    check.holds("06.better", yes, "after > before")
    check.holds("06.better", not yes, "after > before")
    assert capsys.readouterr().out == (
        "06.better: holds: after > before\n"
        "06.better: DOES NOT HOLD here: after > before\n"
    )


def test_holds_refuses_what_is_no_claim():
    with pytest.raises(TypeError, match="after > before"):
        check.holds("06.better", 0.7, "accuracy")


def test_say_shows_prose_in_a_notebook(tmp_path):
    script = """
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from qlora_helpers.lesson import check, merges, recordings
InteractiveShell.instance()
with capture_output() as captured:
    check.say(f"After training **{0.45:.0%}** are right.")
[shown] = captured.outputs
print(shown.data["text/markdown"])
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=check.env.ROOT,
        env={**os.environ, "IPYTHONDIR": str(tmp_path)},
    )
    assert done.stdout == "After training **45%** are right.\n"


def test_say_prints_in_a_script(capsys):
    check.say("After training **45%** are right.")
    assert capsys.readouterr().out == "After training **45%** are right.\n"


def test_journal_keeps_each_comparison(journal):
    check.compare("02.bits", 4, 4.5, unit="bit")
    check.choose("02.saves", ..., answer="b", options=OPTIONS)
    with journal.open("a", encoding="utf-8") as file:
        file.write('{"cut sho\n')
    check.holds("02.better", False, "x")
    rows = [row for _, row in predictions.rows(journal) if row is not None]
    shown = [
        (row["id"], row["kind"], row.get("predicted"), row["measured"]) for row in rows
    ]
    assert shown == [
        ("02.bits", "compare", 4, 4.5),
        ("02.saves", "choose", None, "b"),
        ("02.better", "holds", None, False),
    ]
    assert rows[0]["unit"] == "bit" and rows[0]["time"].endswith("+00:00")


def test_journal_that_cannot_be_written_stops_no_lesson(journal, capsys):
    journal.parent.write_text("a file where the folder should be", encoding="utf-8")
    check.compare("02.bits", 4, 4.5)
    assert "ratio" in capsys.readouterr().out
    assert not journal.exists()


def test_journal_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("QLORA_JOURNAL", "")
    check.compare("02.bits", 4, 4.5)
    assert check.journal_file() is None


# ---- figures


@pytest.fixture
def drawn():
    fig, ax = plots.figure()
    ax.plot([1, 2, 3], [3, 2, 1], label="run 1")
    ax.plot([1, 2, 3], [3, 2, 1.01], label="run 2")
    ax.set(title="The loss falls", xlabel="step", ylabel="loss (nat per token)")
    return fig, ax


ALT = "The loss falls from 3 to 1 in three steps."


def test_show_displays_a_small_picture_with_its_alt_text(tmp_path):
    script = f"""
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from qlora_helpers import plots
InteractiveShell.instance()
fig, ax = plots.figure()
ax.plot([1, 2], [2, 1])
ax.set(title="The loss falls", xlabel="step", ylabel="loss (nat)")
with capture_output() as captured:
    plots.show(fig, alt={ALT!r})
import json
[shown] = captured.outputs
print(json.dumps([shown.data, shown.metadata]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=plots.__file__.rpartition("qlora_helpers")[0],
        env={**os.environ, "IPYTHONDIR": str(tmp_path)},
    )
    data, metadata = json.loads(done.stdout.splitlines()[-1])
    assert metadata == {"image/png": {"alt": ALT}}
    assert data["text/plain"] == f"Figure: {ALT}"
    assert data["image/png"].startswith("iVBOR") and len(data["image/png"]) < 60_000


def test_show_outside_a_notebook_says_what_it_would_show(drawn, capsys):
    plots.show(drawn[0], alt=ALT)
    assert capsys.readouterr().out == f"Figure: {ALT}\n"
    assert plt.get_fignums() == []


@pytest.mark.parametrize("alt", ["", "a figure", None])
def test_show_refuses_a_figure_without_alt_text(drawn, alt):
    with pytest.raises(ValueError, match="say in a sentence"):
        plots.show(drawn[0], alt=alt)


@pytest.mark.parametrize("label", ["", " "])
def test_show_refuses_an_axis_without_a_label(drawn, label):
    drawn[1].set_ylabel(label)
    with pytest.raises(ValueError, match="the y axis has no label: give one"):
        plots.show(drawn[0], alt=ALT)


def test_show_refuses_a_figure_without_a_title(drawn):
    drawn[1].set_title("")
    with pytest.raises(ValueError, match="no title"):
        plots.show(drawn[0], alt=ALT)


def test_bars_start_from_zero(capsys):
    fig, ax = plots.figure()
    ax.bar(["before", "after"], [50, 80], yerr=3)
    ax.set(title="After is better", xlabel="model", ylabel="right (%)")
    plots.show(fig, alt=ALT)
    ax.set_ylim(40, 90)
    with pytest.raises(ValueError, match="start from zero"):
        plots.show(fig, alt=ALT)


def test_shared_inner_axes_need_no_label(capsys):
    fig, axes = plots.figure(2, 1)
    shared, (top, bottom) = plt.subplots(2, 1, sharex=True)
    for ax in (top, bottom):
        ax.plot([1, 2], [1, 2])
        ax.set(title="It grows", ylabel="loss (nat)")
    bottom.set_xlabel("step")
    plots.show(shared, alt=ALT)
    assert len(axes) == 2


def test_labels_at_lines_ends_do_not_overlap(drawn):
    fig, ax = drawn
    plots.label_ends(ax)
    fig.canvas.draw()
    low, high = sorted(text.get_window_extent().y0 for text in ax.texts)
    assert (high - low) * 72 / fig.dpi >= 12.9
    assert [text.get_text() for text in ax.texts] == ["run 1", "run 2"]


def test_colours_stand_out_on_white():
    def light(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = [
            c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts
        ]
        return 0.2126 * r + 0.7152 * g + 0.0722 * b  # WCAG 2, relative luminance

    assert all(1.05 / (light(colour) + 0.05) >= 3 for colour in plots.COLOURS)
    assert len(set(plots.DASHES)) == len(set(plots.MARKERS)) == len(plots.COLOURS)


# ---- the tables and figures of 07


def row_of(into, kind, verdicts, run="one", **more):
    row = {"run": run, "strength": 1, "into": into, "kind": kind}
    return row | {"verdicts": verdicts} | more


def test_merges_are_paired_with_the_trained_model_of_their_own_run():
    rows = [
        row_of("original", "bf16", "0011"),
        row_of("none", "nf4", "1110"),
        row_of("none", "bf16", "1000", run="two", trained_on="bf16"),
        row_of("none", "nf4", "1100", run="two", trained_on="bf16"),
        row_of("original", "nf4", "0000") | {"strength": 2},
        {"run": "random", "strength": 1, "into": "none", "kind": "nf4"},
    ]
    found = merges.against_trained(rows).set_index(["run", "into", "kind"])
    pairs = {name: (row["lost"], row["gained"]) for name, row in found.iterrows()}
    assert pairs == {
        ("one", "original", "bf16"): (2, 1),
        ("one", "none", "nf4"): (0, 0),
        ("two", "none", "bf16"): (0, 0),
        ("two", "none", "nf4"): (0, 1),
    }
    assert found.loc["one", "none", "nf4"]["p"] == 1


def test_every_recorded_merge_has_its_trained_model():
    rows = recordings.read("merge")["rows"]
    found = merges.against_trained(row for row in rows if row.get("asked") == 300)
    assert {"dequantized", "original", "none"} == set(found["into"])
    trained = found[found["kind"] == found.get("trained_on", "nf4")]
    assert not trained.query("into == 'none'")[["lost", "gained"]].any(axis=None)


def test_the_recordings_hold_what_07_says_in_words():
    rows = recordings.read("merge")["rows"]
    runs = merges.against_trained(row for row in rows if "seed" in row)
    by = ["trained_on", "rank", "seed", "into", "kind"]
    runs = runs.set_index(by).sort_index()
    for own, rank, seed in runs.index.droplevel([3, 4]).unique():
        adapter = runs.loc[own, rank, seed]
        right, wrong = ("dequantized", "original")[:: 1 if own == "nf4" else -1]
        other = {"nf4": "bf16", "bf16": "nf4"}[own]
        near, far = adapter.loc[right, "bf16"], adapter.loc[wrong, "bf16"]
        assert far["kl_nats"] > 100 * near["kl_nats"] and near["p"] > 0.3
        beside = adapter.loc["none", other]
        assert all(abs(far[n] - beside[n]) <= 3 for n in ("lost", "gained"))
        trained = adapter.loc["none", own]["right"]
        if rank == 16:
            assert far["p"] < 0.05 and 0.1 < far["lost"] / trained < 0.21
            assert own == "bf16" or 2.6 < far["lost"] / far["gained"] < 6.2
        if rank == 4:
            assert 0.45 < far["lost"] / trained < 0.55
        if rank == 64:
            assert far["p"] > 0.2
    speeds = {}
    for row in recordings.read("serving")["rows"]:
        if "variant" in row:
            run = speeds.setdefault((row["shape"], row["batch"]), {})
            run[row["variant"]] = row["gpu_ms"]
    assert {max(run, key=run.get) for run in speeds.values()} == {"4-bit and adapter"}
    for (_, batch), run in speeds.items():
        ratio = run["4-bit, merged"] / run["16-bit, merged"]
        assert ratio > 1.1 if batch > 1 else 0.3 < ratio < 1.1


def test_lost_answers_go_to_the_left_and_gained_ones_to_the_right(drawn, monkeypatch):
    kept = []
    monkeypatch.setattr(plots, "show", lambda fig, alt: kept.append((fig, alt)))
    merges.lost_and_gained(["a", "b"], [3, 0], [1, 2], "Some answers differ", asked=9)
    [(fig, alt)] = kept
    lost, gained = fig.axes[0].containers
    assert [bar.get_width() for bar in lost] == [-3, 0]
    assert [bar.get_width() for bar in gained] == [1, 2]
    assert "a: 3 lost, 1 gained; b: 0 lost, 2 gained" in alt
    plots.redraw(fig, alt)


def test_what_is_kept_is_drawn_beside_what_was_wanted(monkeypatch):
    kept = []
    monkeypatch.setattr(plots, "show", lambda fig, alt: kept.append((fig, alt)))
    wanted = torch.linspace(-1, 1, 400).reshape(20, 20)
    bases = {"all": wanted, "nothing": torch.zeros(20, 20)}
    merges.kept_by_change(wanted, bases, "Only one base takes it", groups=4)
    [(fig, alt)] = kept
    for ax, slope in zip(fig.axes, (1, 0), strict=True):
        mean, line = ax.get_lines()
        assert line.get_label() == "all of it" and mean.get_label() == "mean kept"
        np.testing.assert_allclose(
            mean.get_ydata(), slope * np.array(mean.get_xdata()), atol=1e-3
        )
    plots.redraw(fig, alt)
