"""Recordings: what an author's tool writes is what the course reads."""

import pytest

from qlora_helpers.lesson import recordings
from tools import recorder

ROWS = [{"tokens": 128, "peak_gib": 2.5}]


def test_recording_round_trip(tmp_path):
    facts = recorder.facts()
    recorder.write("speed", facts, ROWS, folder=tmp_path)
    assert recordings.read("speed", folder=tmp_path) == {"facts": facts, "rows": ROWS}
    assert [path.name for path in tmp_path.iterdir()] == ["speed.json"]
    assert set(recordings.FACTS) <= set(facts)


def test_the_command_names_what_held_the_machine_back(monkeypatch):
    for name in recorder.HELD_BY:
        monkeypatch.delenv(name, raising=False)
    assert recorder.facts()["command"].startswith("python ")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    command = recorder.facts()["command"]
    assert command.startswith("ATEN_CPU_CAPABILITY=avx2 python ")


def test_unknown_recording_names_the_known_ones(tmp_path):
    recorder.write("speed", recorder.facts(), ROWS, folder=tmp_path)
    with pytest.raises(FileNotFoundError, match="'sped' .* there are: speed"):
        recordings.read("sped", folder=tmp_path)


@pytest.mark.parametrize("missing", recordings.FACTS)
def test_recording_without_its_facts_is_refused(missing, tmp_path):
    facts = {key: value for key, value in recorder.facts().items() if key != missing}
    with pytest.raises(ValueError, match=f"facts lack {missing}"):
        recorder.write("speed", facts, ROWS, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "[]", '{"rows": []}', '{"facts": 1, "rows": []}'])
def test_broken_recording_is_named(text, tmp_path):
    (tmp_path / "speed.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="speed"):
        recordings.read("speed", folder=tmp_path)


def test_rows_must_be_rows(tmp_path):
    with pytest.raises(ValueError, match="list of dicts"):
        recorder.write("speed", recorder.facts(), {"peak_gib": 1}, folder=tmp_path)
