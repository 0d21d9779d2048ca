"""Outputs repeat, the learner's face is built and kept, the house is in order."""

import json
import re
import subprocess
import tomllib

import nbformat
import pytest
import rules
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from qlora_helpers import env
from tools import course, picture, predictions

new = nbformat.v4
TEXT_AND_BAR = """import sys, logging
from IPython.display import display
print("one", flush=True)
sys.stderr.write("a log line")
sys.stderr.flush()
print("two")
display({"application/vnd.jupyter.widget-view+json": {}, "text/plain": "0%"}, raw=True)
display({"image/png": "iVBORw0KGgo=", "text/plain": "Figure"},
        metadata={"image/png": {"alt": "A <dark> dot"}}, raw=True)"""


def write(folder, name, *cells):
    """A notebook of (source, tags) code cells and markdown strings."""
    made = [
        new.new_markdown_cell(cell)
        if isinstance(cell, str)
        else new.new_code_cell(cell[0], metadata={"tags": list(cell[1:])})
        for cell in cells
    ]
    folder.mkdir(exist_ok=True)
    notebook = new.new_notebook(cells=made)
    (folder / name).write_text(nbformat.writes(notebook), encoding="utf-8")
    return folder / name


def read(path):
    return nbformat.read(path, as_version=4)


@pytest.fixture
def folder(tmp_path):
    """A course of two notebooks."""
    write(
        tmp_path / "notebooks",
        "00_first.ipynb",
        "# 00 First\n\nThen [the second](01_second.ipynb#next).",
        ("import pathlib\nprint(pathlib.Path.cwd().name)", "setup"),
        ("guess = 3  # too many\nother = 'b'", "prediction"),
        (TEXT_AND_BAR,),
        ("import random\nrandom.random()", "nbval-ignore-output"),
    )
    notebook = read(tmp_path / "notebooks" / "00_first.ipynb")
    notebook.cells.append(
        new.new_markdown_cell("It is two.", metadata={"tags": ["reveal"]})
    )
    (tmp_path / "notebooks" / "00_first.ipynb").write_text(nbformat.writes(notebook))
    write(tmp_path / "notebooks", "01_second.ipynb", "# 01 Second", ("print(1)",))
    return tmp_path / "notebooks"


def test_outputs_are_clean_and_repeat(folder, capsys):
    course.outputs(folder=folder)
    path = folder / "00_first.ipynb"
    once = read(path)
    for rule in (rules.valid, rules.counts, rules.hashes, rules.metadata, rules.errors):
        assert list(rule(once, path)) == []
    assert once.cells[1].outputs[0].text == "notebooks\n"  # run where it lies
    text, picture = once.cells[3].outputs
    assert text.text == "one\ntwo\n"  # neither the log line nor the bar
    assert picture.metadata["image/png"]["alt"] == "A <dark> dot"
    assert re.search(r"(?m)^00_first \.\.\. \d+ s\n01_second", capsys.readouterr().out)

    course.outputs(folder=folder)
    again = read(path)
    ignored = once.cells[4].outputs, again.cells[4].outputs
    assert ignored[0] != ignored[1]
    again.cells[4] = once.cells[4]  # its hash covers the output, so it differs too
    assert nbformat.writes(again) == nbformat.writes(once)


def test_outputs_of_named_notebooks_alone(folder):
    untouched = (folder / "01_second.ipynb").read_bytes()
    course.outputs(["00"], folder)
    assert (folder / "01_second.ipynb").read_bytes() == untouched
    assert read(folder / "00_first.ipynb").cells[1].execution_count == 1


def test_a_wrong_name_lists_the_notebooks(folder, capsys):
    with pytest.raises(ValueError, match="no notebook '07'; .* 00_first, 01_second"):
        course.outputs(["07"], folder)


def test_a_failing_notebook_keeps_its_outputs(folder):
    path = write(folder, "02_third.ipynb", ("1 / 0",))
    before = path.read_bytes()
    with pytest.raises(course.CellExecutionError, match="ZeroDivisionError"):
        course.outputs(["02"], folder)
    assert path.read_bytes() == before
    assert not list(folder.glob("*.part"))


def test_run_writes_copies_and_pages_and_stops_at_a_failure(folder, tmp_path, capsys):
    before = (folder / "00_first.ipynb").read_bytes()
    write(folder, "01_broken.ipynb", ("print('before')",), ("raise OSError('gone')",))
    with pytest.raises(course.CellExecutionError, match="OSError.*gone"):
        course.run(folder=folder, build=tmp_path / "build")
    assert sorted(path.name for path in (tmp_path / "build").iterdir()) == [
        "00_first.html",
        "00_first.ipynb",
        "01_broken.ipynb",
    ]
    assert (folder / "00_first.ipynb").read_bytes() == before
    page = (tmp_path / "build" / "00_first.html").read_text(encoding="utf-8")
    assert 'alt="A &lt;dark&gt; dot"' in page
    assert 'href="01_second.html#next"' in page
    reached = read(tmp_path / "build" / "01_broken.ipynb").cells
    assert reached[0].outputs[0].text == "before\n"
    assert "01_broken ... failed after" in capsys.readouterr().out


def test_command_line_reports_failure(folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(course, "find", lambda names, _: [folder / "00_broken.ipynb"])
    monkeypatch.setattr(
        course, "outputs", lambda names: course.run(names, build=tmp_path)
    )
    write(folder, "00_broken.ipynb", ("raise OSError('gone')",))
    assert course.main(["outputs"]) == 1
    shown = capsys.readouterr().err
    assert "OSError" in shown and "raise OSError('gone')" in shown
    assert "\x1b" not in shown


# ---- the learner's face


def test_learners_face(folder, tmp_path):
    course.outputs(["00"], folder)
    course.learner(folder, tmp_path / "my_course")
    first = read(tmp_path / "my_course" / "00_first.ipynb")
    assert first.cells[2].source == "guess = ...\nother = ..."
    assert first.cells[5].source == (
        "<details><summary>After you ran it</summary>\n\nIt is two.\n\n</details>"
    )
    for cell in first.cells[1:5]:
        assert cell.outputs == [] and cell.execution_count is None
    assert [cell.id for cell in first.cells] == [
        cell.id for cell in read(folder / "00_first.ipynb").cells
    ]


@pytest.mark.parametrize(
    "source, blank",
    [
        ("a = 4  # what it suggests", "a = ..."),
        ("# options: a, b\na = 'b'", "# options: a, b\na = ..."),
        ("a = (\n    4\n)  # four\nb = -1", "a = ...\nb = ..."),
        ("größe = 'ü'  # ß", "größe = ..."),
    ],
)
def test_blank_hides_guess_and_remark(source, blank):
    assert course.blank(source) == blank


def test_an_edited_copy_is_never_overwritten(folder, tmp_path, capsys):
    mine = tmp_path / "my_course" / "00_first.ipynb"
    course.learner(folder, mine.parent)
    notebook = read(mine)
    notebook.cells[2].source = "guess = 2"
    mine.write_text(nbformat.writes(notebook), encoding="utf-8")
    edited = mine.read_bytes()
    capsys.readouterr()

    course.learner(folder, mine.parent)
    assert mine.read_bytes() == edited
    shown = capsys.readouterr().out
    assert "00_first.ipynb: kept" in shown and "rename" not in shown

    write(folder, "00_first.ipynb", "# 00 First, better", ("print(2)",))
    course.learner(folder, mine.parent)
    assert mine.read_bytes() == edited
    assert "rename it to get the new version" in capsys.readouterr().out

    mine.rename(mine.with_name("mine.ipynb"))
    course.learner(folder, mine.parent)
    assert read(mine).cells[0].source == "# 00 First, better"


def test_an_opened_but_unedited_copy_follows_the_course(folder, tmp_path):
    copy = tmp_path / "my_course" / "01_second.ipynb"
    course.learner(folder, copy.parent)
    notebook = read(copy)
    notebook.metadata.language_info["version"] = "3.13.1"  # what JupyterLab adds
    copy.write_text(nbformat.writes(notebook), encoding="utf-8")
    write(folder, "01_second.ipynb", "# 01 Second, better")
    course.learner(folder, copy.parent)
    assert read(copy).cells[0].source == "# 01 Second, better"


@pytest.mark.parametrize("text", ["", "not a notebook", '{"cells": 1}'])
def test_what_is_no_notebook_is_kept_too(text, folder, tmp_path):
    mine = tmp_path / "my_course" / "01_second.ipynb"
    mine.parent.mkdir()
    mine.write_text(text, encoding="utf-8")
    course.learner(folder, mine.parent)
    assert mine.read_text(encoding="utf-8") == text


def test_addresses_are_stamped_moved_and_removed(folder):
    path = folder / "00_first.ipynb"
    write(folder, path.name, "# 00 First", ('REPOSITORY = ""\nprint(1)', "setup"))
    course.outputs(["00"], folder)
    plain = path.read_bytes()
    for address in ("https://github.com/old/place", "https://github.com/new/place"):
        course.stamp(folder, address)
        first, setup = read(path).cells
        assert first.source == (
            "# 00 First\n\n[Open in Colab](https://colab.research.google.com/github/"
            f"{address[19:]}/blob/main/notebooks/00_first.ipynb)"
        )
        assert setup.source == f'REPOSITORY = "{address}"\nprint(1)'
        assert list(rules.hashes(read(path), path)) == []
    course.stamp(folder, "")
    assert path.read_bytes() == plain


def test_stamping_does_not_hide_an_edited_output(folder):
    path = folder / "00_first.ipynb"
    course.outputs(["00"], folder)
    notebook = read(path)
    notebook.cells[1].outputs[0].text = "elsewhere\n"
    path.write_text(nbformat.writes(notebook), encoding="utf-8")
    course.stamp(folder, "https://github.com/new/place")
    assert len(list(rules.hashes(read(path), path))) == 1


def test_predictions_of_a_journal_are_plotted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predictions, "OUT", tmp_path / "predictions.png")
    row = {"id": "02.bits", "kind": "compare", "predicted": 4, "measured": 4.5}
    (tmp_path / "mine.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert course.main(["predictions", str(tmp_path)]) == 0
    assert "02.bits" in capsys.readouterr().out
    assert course.main(["predictions", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err


# ---- README's picture

SHOWN = (
    """question: Who was late?

without the adapter:
All of them,
I guess.
-> only a query may run (SELECT or WITH), but the text starts with ALL

with the adapter:
SELECT rider FROM ticket WHERE trip=1
rider
  Eva
 Karl
""",
    """without the adapter: 3 of 100 right, recorded
with the adapter: 96 of 100 right, recorded
""",
)


@pytest.fixture
def source(tmp_path):
    """A notebook with the two cells whose outputs the picture shows."""
    cells = []
    for id, text in zip(picture.CELLS, SHOWN, strict=True):
        output = new.new_output("stream", name="stdout", text=text)
        cells.append(new.new_code_cell("print()", id=id, outputs=[output]))
    path = tmp_path / "00_first.ipynb"
    path.write_text(nbformat.writes(new.new_notebook(cells=cells)), encoding="utf-8")
    return path


def test_the_picture_is_current():
    assert picture.stored_hash() == picture.made_from(picture.read()), (
        "docs/before_after.png is out of date: python -m tools.course picture"
    )
    assert picture.PICTURE.stat().st_size <= 60_000


def test_the_words_for_the_picture_say_what_it_shows():
    readme = (env.ROOT / "README.md").read_text(encoding="utf-8")
    [words] = re.findall(r"!\[(.+)\]\(docs/before_after\.png\)", readme)
    facts = picture.read()
    assert re.findall(r"(\d+) of 100", words) == [facts["before"], facts["after"]]


def test_the_picture_is_made_from_printed_text(source, tmp_path):
    png = picture.main(source, tmp_path / "picture.png")
    facts = picture.read(source)
    assert facts == {
        "question": "Who was late?",
        "wrong": "All of them,\nI guess.",
        "sql": "SELECT rider FROM ticket WHERE trip=1",
        "rows": "rider\n  Eva\n Karl\n",
        "before": "3",
        "after": "96",
    }
    shown = [text.get_text() for text in picture.draw(facts).axes[0].texts]
    for words in ("Who was late?", "Eva, Karl", "96 of 100 answers are right"):
        assert words in shown
    assert picture.stored_hash(png) == picture.made_from(facts)
    assert picture.stored_hash(png) != picture.made_from(facts | {"after": "97"})


def test_a_picture_without_its_outputs_says_what_to_run(source, tmp_path):
    notebook = read(source)
    notebook.cells[1].outputs = []
    source.write_text(nbformat.writes(notebook), encoding="utf-8")
    with pytest.raises(ValueError, match="'before'.*`make outputs NOTEBOOKS=00`"):
        picture.main(source, tmp_path / "picture.png")


def test_new_outputs_give_a_new_picture(folder, monkeypatch):
    drawn = []
    monkeypatch.setattr(picture, "SOURCE", folder / "00_first.ipynb")
    monkeypatch.setattr(picture, "main", lambda: drawn.append(True))
    course.outputs(folder=folder)
    assert drawn == [True]


# ---- the house


def project():
    return tomllib.loads((env.ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def ranges():
    """Name to range of each dependency in pyproject.toml."""
    found = map(Requirement, project()["project"]["dependencies"])
    return {requirement.name: requirement.specifier for requirement in found}


def test_tested_versions_lie_in_the_ranges_of_the_package():
    pins = rules.requirements()
    for name, allowed in ranges().items():
        assert pins[name] in allowed, name


def test_the_machine_check_knows_the_same_ranges():
    assert {name: ranges()[name] for name in env.TESTED} == {
        name: SpecifierSet(text) for name, text in env.TESTED.items()
    }


def test_each_requirement_is_exact_and_says_why():
    text = (env.ROOT / "requirements.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"[\w-]+==[\d.]+ +# \w.{10,}", line), line
    assert "://" not in text and "--" not in text


def test_nothing_private_is_in_the_repository():
    done = subprocess.run(
        ["git", "ls-files"], cwd=env.ROOT, capture_output=True, text=True, check=False
    )
    for name in done.stdout.splitlines():
        path = env.ROOT / name
        if (
            path.suffix in (".py", ".md", ".toml", ".txt", ".cfg", "")
            and path.is_file()
        ):
            text = path.read_text(encoding="utf-8")
            for host in rules.REGISTRIES:
                assert host not in text, f"{name} names the registry host {host}"
            assert not re.search(r"\bhf_[A-Za-z0-9]{30,}", text), name
