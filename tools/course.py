"""Run the course, store its outputs, and build the learner's face.

Use: python -m tools.course outputs|run [NOTEBOOK ...]
     python -m tools.course learner|stamp|picture|fetch
     python -m tools.course predictions [JOURNAL or FOLDER]
"""

import argparse
import ast
import contextlib
import hashlib
import json
import os
import pathlib
import re
import sys
import time
import tomllib

import jinja2
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbconvert import HTMLExporter

from qlora_helpers import env
from qlora_helpers.lesson import recordings
from qlora_helpers.model_files import write_whole
from tools import picture, predictions

NOTEBOOKS = env.ROOT / "notebooks"
LEARNER = env.ROOT / "my_course"
BUILD = env.ROOT / "build"

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
WIDGET = "application/vnd.jupyter.widget-view+json"
# For every kernel that the course starts itself; an author's runs are no learner's.
KERNEL_VARIABLES = env.QUIET | {"QLORA_JOURNAL": ""}
# nbconvert's page drops a picture's alt text, and loads scripts that none here needs.
PAGE = """{% extends 'lab/index.html.j2' %}
{% block html_head_js %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
{% block data_png %}<img src="data:image/png;base64,{{ output.data['image/png'] }}"
alt="{{ output | get_metadata('alt', 'image/png') | escape_html }}">{% endblock %}"""


def find(names=(), folder=NOTEBOOKS) -> list[pathlib.Path]:
    """The notebooks of the course in order, or those named: "06" or "06_train_llama".

    Raises ValueError for a name that no notebook has.
    """
    known = sorted(pathlib.Path(folder).glob("[0-9][0-9]_*.ipynb"))
    found = []
    for name in names:
        stem = pathlib.Path(name).stem
        hits = [path for path in known if stem in (path.stem, path.stem[:2])]
        if not hits:
            stems = ", ".join(path.stem for path in known)
            raise ValueError(f"no notebook {name!r}; there are: {stems}")
        found += hits
    return sorted(set(found)) if names else known


def output_hash(cell) -> str:
    """The SHA-256 of a code cell's source and of all that its outputs hold.

    It is stored in the cell's metadata, so that no edit of either goes unseen.
    """
    return _sha256_of([cell.source, cell.outputs])


def execute(path, notebook=None):
    """Run a notebook in a clean kernel, in its folder; the notebook with its outputs.

    `notebook` is run in place of the file's content, where given.

    Raises nbclient's CellExecutionError or DeadKernelError; its `notebook` attribute
    is what was reached.
    """
    notebook = nbformat.read(path, as_version=4) if notebook is None else notebook
    place = {"metadata": {"path": str(pathlib.Path(path).parent)}}
    client = NotebookClient(
        notebook, kernel_name="python3", timeout=None, resources=place
    )
    client.record_timing = False
    client.extra_arguments = ["--IPKernelApp.log_level=ERROR"]  # no word on encryption
    try:
        return client.execute(env={**os.environ, **KERNEL_VARIABLES})
    except (CellExecutionError, DeadKernelError) as error:
        error.notebook = notebook
        raise


def clean(notebook):
    """Strip in place what is no part of the lesson: timing, widgets, stderr, kernel.

    nbclient's `coalesce_streams` would put what a cell prints after a figure before it,
    and nbconvert's ClearMetadataPreprocessor leaves the metadata of markdown cells.
    """
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type != "code":
            continue
        kept = []
        for output in cell.outputs:
            if output.get("name") == "stderr" or WIDGET in output.get("data", {}):
                continue  # log lines and progress bars
            last = kept[-1] if kept else {}
            if output.output_type == "stream" and last.get("name") == output.name:
                last.text += output.text  # one stream, in however many pieces it came
            else:
                kept.append(output)
        cell.outputs = kept
    language = {"name": "python"}
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": KERNEL, "language_info": language}
    )
    return notebook


def outputs(names=(), folder=NOTEBOOKS) -> None:
    """Run notebooks and store their outputs, each cell with its hash.

    A notebook that fails is left as it was. Raises as `execute` does.
    """
    for path in find(names, folder):
        with _progress(path.stem):
            store(path, execute(path))


def store(path, notebook) -> None:
    """Replace a notebook by its executed self, each code cell with its hash.

    README's picture shows outputs of one notebook, and is drawn again with them.
    """
    notebook = clean(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata["output_sha256"] = output_hash(cell)
    write_whole(path, nbformat.writes(notebook))
    if pathlib.Path(path) == picture.SOURCE:
        picture.main()


def run(names=(), folder=NOTEBOOKS, build=BUILD) -> None:
    """Run the course in order: executed copies and HTML pages under `build`.

    Stops at the first notebook that fails; its copy shows how far it came.
    Raises as `execute` does.
    """
    build = pathlib.Path(build)
    build.mkdir(parents=True, exist_ok=True)
    for path in find(names, folder):
        with _progress(path.stem):
            try:
                notebook = clean(execute(path))
            except (CellExecutionError, DeadKernelError) as error:
                write_whole(build / path.name, nbformat.writes(clean(error.notebook)))
                raise
            write_whole(build / path.name, nbformat.writes(notebook))
            write_whole(build / f"{path.stem}.html", page(notebook, path.stem))


def page(notebook, title) -> str:
    """A notebook as one HTML page; links to notebooks become links to their pages."""
    exporter = HTMLExporter(
        template_file="page.html.j2",
        extra_loaders=[jinja2.DictLoader({"page.html.j2": PAGE})],
    )
    html, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": title}})
    return re.sub(r'(href="\d\d_\w+)\.ipynb', r"\1.html", html)


def learners_face(notebook):
    """The learner's face: no outputs, blank predictions, reveals folded away."""
    notebook = clean(notebook)
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            if "prediction" in tags:
                cell.source = blank(cell.source)
        elif "reveal" in tags:
            cell.source = (
                "<details><summary>After you ran it</summary>\n\n"
                f"{cell.source.strip()}\n\n</details>"
            )
    return notebook


def blank(source) -> str:
    """A prediction cell with `...` in place of each guess, and without its remark."""
    lines = source.splitlines()
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.Assign):
            names = " = ".join(ast.unparse(target) for target in node.targets)
            lines[node.lineno - 1 : node.end_lineno] = [f"{names} = ..."]
    return "\n".join(lines)


def learner(folder=NOTEBOOKS, target=LEARNER) -> None:
    """Build the learner's face of every notebook; a copy that was changed is kept."""
    target = pathlib.Path(target)
    target.mkdir(parents=True, exist_ok=True)
    for path in find(folder=folder):
        new = learners_face(nbformat.read(path, as_version=4))
        print_of_new = _fingerprint(new)
        copy = target / path.name
        if copy.exists():
            print_of_built, print_of_copy = _prints(copy)
            if print_of_copy != print_of_built:
                newer = print_of_new != print_of_built
                more = "; rename it to get the new version" if newer else ""
                print(f"{copy.name}: kept as you changed it{more}")
                continue
        new.metadata["built_sha256"] = print_of_new
        write_whole(copy, nbformat.writes(new))
        print(f"{copy.name}: ready in {target.name}")


def stamp(folder=NOTEBOOKS, address=None) -> None:
    """Stamp what is known elsewhere into every notebook: its address and its cost.

    The public address has one place, `[project.urls] Repository` in pyproject.toml. It
    gives a Colab link in the first cell (none without an address) and REPOSITORY in the
    set-up cell. Seconds and memory come from data/measured/notebooks.json, and go into
    README's map as well.
    """
    if address is None:
        text = (env.ROOT / "pyproject.toml").read_text(encoding="utf-8")
        address = tomllib.loads(text)["project"].get("urls", {}).get("Repository", "")
    for path in find(folder=folder):
        notebook = nbformat.read(path, as_version=4)
        first = notebook.cells[0]
        first.source = cost(first.source, path.stem)
        first.source = re.sub(r"\n*\[Open in Colab\]\(.*\)$", "", first.source)
        if address:
            where = address.rstrip("/").removeprefix("https://")
            link = f"https://colab.research.google.com/{where.replace('.com', '', 1)}"
            first.source += (
                f"\n\n[Open in Colab]({link}/blob/main/notebooks/{path.name})"
            )
        for cell in notebook.cells:
            if "setup" in cell.metadata.get("tags", []) and cell.cell_type == "code":
                unedited = cell.metadata.get("output_sha256") == output_hash(cell)
                cell.source = re.sub(
                    r'(?m)^(\s*REPOSITORY = )"[^"]*"', rf'\1"{address}"', cell.source
                )
                # Only Colab reads the address, so the stored output is still right.
                if unedited:
                    cell.metadata["output_sha256"] = output_hash(cell)
        write_whole(path, nbformat.writes(notebook))
    if pathlib.Path(folder) == NOTEBOOKS:
        readme = env.ROOT / "README.md"
        write_whole(readme, readme_map(readme.read_text(encoding="utf-8")))


def readme_map(readme) -> str:
    """README's map, each notebook's row completed by what it took on each machine.

    The columns that are filled are those whose heading names a machine and its dtype,
    as "two CPU cores, float32".
    """
    took = {}
    for row in recordings.read("notebooks")["rows"]:
        memory = row["peak_gpu_gib"] or row["peak_ram_gib"]
        where = row["notebook"], f"{row['machine']}, {row['computes_in']}"
        took[where] = f"{row['seconds'] / 60:.1f} min, {memory:.1f} GiB"
    lines, machines = [], []
    for line in readme.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| notebook |"):
            machines = cells[2:]
        elif not line.startswith("|"):
            machines = []
        found = re.search(r"\(notebooks/(\w+)\.ipynb\)", cells[0])
        if machines and found:
            cells[2:] = [took.get((found[1], machine), "") for machine in machines]
            line = f"| {' | '.join(cells)} |"
        lines.append(line)
    return "\n".join(lines) + "\n"


def cost(header, stem) -> str:
    """A header with its **Time** and **Needs** completed by what was measured."""
    rows = [r for r in recordings.read("notebooks")["rows"] if r["notebook"] == stem]

    def where(row):
        one = "" if row["machine"].endswith("CPU cores") else "one "
        cap = f" limited to {row['cap_gib']:.0f} GiB" if row["cap_gib"] else ""
        return f"{one}{row['machine']}{cap} in {row['computes_in']}"

    ran = [f"{r['seconds'] / 60:.1f} min on {where(r)}" for r in rows]
    took = [
        f"{r['peak_gpu_gib']:.1f} GiB of GPU memory on {where(r)}"
        if r["peak_gpu_gib"]
        else f"{r['peak_ram_gib']:.1f} GiB of main memory on {where(r)}"
        for r in rows
    ]
    known = (
        ("Time", "(an estimate)", f"; the cells ran for {_listed(ran)}."),
        ("Needs", "of memory", f"; the peak was {_listed(took)}."),
    )
    for part, end, ran_or_took in known:
        text = ran_or_took if rows else "; running it was not measured."
        header = re.sub(
            rf"(?m)^(\*\*{part}\*\*: .*?{re.escape(end)}).*(?:\n.+)*",
            lambda found, text=text: found[1] + text,
            header,
        )
    return header


def _listed(parts: list[str]) -> str:
    """The parts as an English list: "a, b and c"."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def fetch() -> None:
    """Fetch and convert the embedded Llama, unless it is in the cache already."""
    from qlora_helpers.models import embedded  # slow to import, needed here alone

    print("embedded Llama:", embedded.embedded_dir())


def _fingerprint(notebook) -> str:
    """A hash of all that a learner may change: opening a notebook is no change."""
    cells = [
        [cell.cell_type, cell.source, cell.get("outputs"), cell.metadata.get("tags")]
        for cell in notebook.cells
    ]
    return _sha256_of(cells)


def _sha256_of(value) -> str:
    """The SHA-256 of a value's JSON; the order of keys makes no difference."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _prints(copy) -> tuple[str | None, str | None]:
    """What was built and what is there now; they differ if the copy was changed."""
    try:
        notebook = nbformat.read(copy, as_version=4)
    except Exception:  # nbformat raises whatever it stumbles over
        return None, "unreadable"
    return notebook.metadata.get("built_sha256"), _fingerprint(notebook)


@contextlib.contextmanager
def _progress(name):
    """One line: the notebook's name, then its seconds or that it failed."""
    print(f"{name} ...", end=" ", flush=True)
    start = time.monotonic()
    how = "failed after "
    try:
        yield
        how = ""
    finally:
        print(f"{how}{time.monotonic() - start:.0f} s", flush=True)


def main(arguments=None) -> int:
    """The command line; 1 if a notebook failed, 2 for a wrong name."""
    parser = argparse.ArgumentParser(prog="python -m tools.course")
    on_notebooks = {"outputs": outputs, "run": run}
    others = {"learner": learner, "stamp": stamp, "fetch": fetch}
    others["picture"] = picture.main
    commands = [*on_notebooks, *others, "predictions"]
    parser.add_argument("command", choices=commands)
    parser.add_argument(
        "names",
        nargs="*",
        help="notebooks, such as 06 (default: all); for predictions a journal or a "
        "folder of journals (default: your own)",
    )
    given = parser.parse_args(arguments)
    try:
        if given.command in on_notebooks:
            on_notebooks[given.command](given.names)
        elif given.command == "predictions":
            predictions.main(*given.names[:1])
        else:
            others[given.command]()
    except (CellExecutionError, DeadKernelError) as error:
        print(re.sub(r"\x1b\[[0-9;]*m", "", str(error)), file=sys.stderr)
        return 1
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
