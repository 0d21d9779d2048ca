"""The plots of predictions: what a reader, or a teacher with a folder, gets."""

import json
import pathlib
import subprocess
import sys

import pytest

from qlora_helpers import env
from qlora_helpers.lesson import check
from tools import predictions


def write(file, *rows):
    """Write a journal; a row is (id, predicted, measured), a str a line as it is."""
    lines = []
    for row in rows:
        if isinstance(row, tuple):
            id, predicted, measured = row
            kind = "choose" if isinstance(measured, str) else "compare"
            row = {"id": id, "kind": kind, "predicted": predicted, "measured": measured}
            row = json.dumps(row)
        lines.append(row + "\n")
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(lines), encoding="utf-8")


@pytest.fixture
def room(tmp_path):
    """A folder with the journals of three readers."""
    folder = tmp_path / "room"
    write(folder / "ada.jsonl", ("02.bits", 4, 4.5), ("02.saves", "a", "b"))
    write(folder / "bo.jsonl", ("02.bits", 9, 4.5), ("02.saves", "b", "b"))
    write(folder / "cy.jsonl", ("02.bits", 4.5, 4.5))
    return folder


def test_a_journal_that_the_course_wrote_becomes_a_picture(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("QLORA_JOURNAL", str(tmp_path / "journal.jsonl"))
    check.compare("02.bits", 4, 4.5, unit="bit")
    check.choose("02.saves", "a", "b", ["little", "much"])
    check.holds("02.better", True, "better than before")
    capsys.readouterr()
    out = tmp_path / "build" / "predictions.png"
    assert predictions.main(out=out) == out
    assert out.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert capsys.readouterr().out.splitlines() == [
        "02.bits: 0.889 x the measurement",
        "02.saves: 0 of 1 right",
        str(out),
    ]


def test_a_room_has_medians_and_counts(room, tmp_path, capsys):
    predictions.main(room, tmp_path / "room.png")
    assert capsys.readouterr().out.splitlines()[:2] == [
        "02.bits: median of 3 guesses: 1 x the measurement",
        "02.saves: 1 of 2 right",
    ]
    guesses, _ = predictions.read(predictions.journals(room))
    numbers, choices = predictions.draw(guesses, readers=3).axes
    assert numbers.get_xscale() == "log"
    ticks = [tick.get_text() for tick in numbers.get_yticklabels()]
    assert ticks == ["02.bits"]
    points = numbers.lines[0].get_xdata()
    assert list(points) == pytest.approx([4 / 4.5, 2, 1])
    assert [bar.get_width() for bar in choices.patches] == [50]
    assert [text.get_text() for text in choices.texts] == ["1 of 2"]


def test_only_the_first_guess_counts_and_ids_keep_the_courses_order(tmp_path):
    file = tmp_path / "journal.jsonl"
    write(file, ("03.b", 1, 2), ("01.a", None, 2), ("01.a", 6, 2), ("01.a", 2, 2))
    guesses, left_out = predictions.read([file])
    assert list(guesses.items()) == [("01.a", [3]), ("03.b", [0.5])]
    assert left_out == []


@pytest.mark.parametrize(
    "line, why",
    [
        (("02.a", 0, 4), "the guess is 0, which a log axis cannot show"),
        (("02.a", -3, 4), "the guess is -3,"),
        (("02.a", 3, 0), "the measurement is 0,"),
        (("02.a", float("inf"), 4), "the guess is inf,"),
        (("02.a", float("nan"), 4), "the guess is nan,"),
        (("02.a", 10**400, 4), "the guess is 1000"),
        (("02.a", 1e-300, 1e300), "the ratio is 0, too far"),
        (("02.a", "four", 4), "no row of a journal"),
        ('{"id": "02.a", "kin', "no row of a journal"),
        ("[1, 2]", "no row of a journal"),
        ('{"id": 2}', "no row of a journal"),
    ],
)
def test_what_cannot_be_plotted_is_left_out_and_said(line, why, tmp_path, capsys):
    file = tmp_path / "journal.jsonl"
    write(file, ("01.a", 1, 2), line)
    predictions.main(file, tmp_path / "out.png")
    printed = capsys.readouterr().out
    assert "left out: journal.jsonl, line 2: " in printed and why in printed
    assert "01.a: 0.5 x the measurement" in printed
    assert (tmp_path / "out.png").exists()


def test_a_first_guess_of_zero_is_not_replaced_by_a_later_one(tmp_path):
    file = tmp_path / "journal.jsonl"
    write(file, ("02.a", 0, 4), ("02.a", 4, 4))
    guesses, left_out = predictions.read([file])
    assert guesses == {} and len(left_out) == 1


def test_one_id_holds_one_kind_of_guess(room):
    write(room / "dee.jsonl", ("02.bits", "a", "a"))
    guesses, left_out = predictions.read(predictions.journals(room))
    assert len(guesses["02.bits"]) == 3
    assert left_out == [
        "dee.jsonl, line 1: 02.bits: elsewhere it is a guess of another kind"
    ]


def test_extreme_ratios_still_make_a_picture(tmp_path):
    file = tmp_path / "journal.jsonl"
    write(file, ("02.a", 9e11, 1), ("02.b", 2e-12, 1), ("02.c", 1e300, 1))
    assert predictions.main(file, tmp_path / "out.png").exists()


def test_nothing_to_plot_is_a_sentence_and_no_picture(tmp_path, capsys):
    file = tmp_path / "journal.jsonl"
    write(file, ("02.a", None, 4))
    assert predictions.main(file, tmp_path / "out.png") is None
    assert "There is nothing to plot, because" in capsys.readouterr().out
    assert not (tmp_path / "out.png").exists()


def test_a_wrong_path_is_named_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "tools.predictions", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=env.ROOT)
    assert done.returncode == 1
    assert "none does not exist: run a notebook's cells" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file in .* ends in .jsonl"):
        predictions.main(tmp_path)


def test_a_picture_that_cannot_be_written_leaves_the_old_one(
    room, tmp_path, monkeypatch
):
    out = tmp_path / "out.png"
    out.write_bytes(b"old")

    def full(file, data):
        raise OSError("no space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space left"):
        predictions.main(room, out)
    assert out.read_bytes() == b"old"
