"""The benchmarks import, and what they share loses no row."""

import importlib
import os

import pytest

from qlora_helpers import env
from qlora_helpers.lesson import recordings

FOLDER = env.ROOT / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.fixture
def common(monkeypatch, tmp_path):
    """benchmarks/common.py, writing into an empty folder."""
    monkeypatch.syspath_prepend(FOLDER)
    module = importlib.import_module("common")
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    return module


def rows_of(common):
    return recordings.read("toy", common.FOLDER)["rows"]


def toy(count, dies):
    """Run in a child: yield rows, then end in one of two ways."""
    for n in range(count):
        yield {"n": n, "profile": os.environ["QLORA_PROFILE"]}
    if dies == "killed":
        os._exit(9)
    if dies == "raises":
        raise ValueError("toy")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_imports(name, common):
    module = importlib.import_module(name)
    assert module.__doc__
    assert name == "common" or callable(module.main)


@pytest.mark.parametrize("dies", ["killed", "raises"])
def test_rows_of_a_child_that_dies_are_kept(dies, common, monkeypatch):
    monkeypatch.setenv("QLORA_PROFILE", "cpu")
    rows = common.in_child(toy, 2, dies, QLORA_PROFILE="fp16")
    with pytest.raises(RuntimeError, match="toy.*ended early, with exit code"):
        common.record("toy", rows, same=("n",))
    expected = [{"n": 0, "profile": "fp16"}, {"n": 1, "profile": "fp16"}]
    assert rows_of(common) == expected
    assert os.environ["QLORA_PROFILE"] == "cpu"


def test_each_row_is_written_before_the_next_is_measured(common):
    def measure():
        yield {"n": 0}
        assert rows_of(common) == [{"n": 0}]
        yield {"n": 1}

    common.record("toy", measure(), same=("n",))
    assert len(rows_of(common)) == 2


def test_what_is_measured_again_replaces_its_rows_in_their_place(common):
    first = [{"part": "a", "n": 0}, {"part": "a", "n": 1}, {"part": "b", "n": 2}]
    common.record("toy", first, same=("part",))
    common.record("toy", [{"part": "a", "n": 3}], same=("part",))
    common.record("toy", [{"part": "c", "n": 4}], same=("part",))
    assert [row["n"] for row in rows_of(common)] == [3, 2, 4]


def test_a_measurement_that_gives_no_row_leaves_the_old_ones(common):
    common.record("toy", [{"n": 0}], same=("n",))
    common.record("toy", [], same=("n",))
    assert rows_of(common) == [{"n": 0}]


def test_unknown_names_are_refused(common):
    assert common.names_or_all([], ["1B", "8B"]) == ["1B", "8B"]
    with pytest.raises(SystemExit, match="unknown: 9B; known: 1B, 8B"):
        common.names_or_all(["9B"], ["1B", "8B"])


def test_a_run_over_random_rows_trains(common):
    memory_grid = importlib.import_module("memory_grid")
    run = {"shape": "tiny", "method": "qlora", "length": 16, "rows": 2, "every": 1}
    run["cap_gib"] = None
    machine = env.profile_of("cpu")
    model = memory_grid.make(run, machine)
    row = memory_grid.measured(run, model, machine)
    assert row["steps"] == memory_grid.MORE_STEPS
    assert row["peak_gib"] > 0 and row["seconds_per_step"] >= 0
    trainer = memory_grid.trainer_for(model, run, machine, steps=3)
    assert trainer.args.max_steps == 3
    assert {len(ids) for ids in trainer.train_dataset["input_ids"]} == {16}
