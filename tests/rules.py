"""The notebook rules: each takes a notebook and its path, and yields what breaks it."""

import ast
import decimal
import functools
import importlib.metadata
import itertools
import re
import sys
import typing

import nbformat

from qlora_helpers import env
from qlora_helpers.lesson import recordings
from tools import course

TAGS = {
    "setup",
    "settings",
    "prediction",
    "reveal",
    "exercise",
    "solution",
    "gpu",
    "nbval-ignore-output",
    "nbval-check-output",
    "raises-exception",
}
HEADER = (
    "**Question**",
    "**You will be able to**",
    "**Before**",
    "**Time**",
    "**Needs**",
    "**Downloads**",
)
ENDING = ["What we found", "Exercises", "Next"]
PICTURES = ("image/png", "image/jpeg", "image/svg+xml")
# halves, so that this file does not break the rule that it states
REGISTRIES = [
    name + end
    for name, end in (
        ("pypi", ".org"),
        ("pythonhosted", ".org"),
        ("download.pytorch", ".org"),
        ("conda.anaconda", ".org"),
    )
]
PRIVATE = re.compile(
    r"(?<![\w.])/(?:home|root|Users|work|tmp|mnt|opt)/\w|[A-Z]:\\Users"
    r"|\bhf_[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}"
)


def tagged(cell, tag) -> bool:
    return tag in cell.metadata.get("tags", [])


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook):
    """Each markdown cell's text without its fenced code."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            yield re.sub(r"(?ms)^```.*?^```", "", cell.source)


def headings(notebook):
    """(level, text) of each heading, in order."""
    for text in prose(notebook):
        for marks, words in re.findall(r"(?m)^(#+) +(.+?)\s*$", text):
            yield len(marks), words


def tree(cell):
    """A cell's syntax tree; an empty one where it is no plain Python (a rule's own)."""
    try:
        return ast.parse(cell.source)
    except SyntaxError:
        return ast.Module(body=[], type_ignores=[])


def calls(syntax, module):
    """Each call of `module.name(...)` in a syntax tree, as (name, node)."""
    for node in ast.walk(syntax):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == module
        ):
            yield node.func.attr, node


# ---- where the outputs come from


def valid(notebook, path):
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        yield f"not a valid notebook: {str(error).splitlines()[0]}"
    if (notebook.nbformat, notebook.nbformat_minor) < (4, 5):
        yield "older than format 4.5, so its cells have no ids"


def counts(notebook, path):
    found = [cell.execution_count for cell in code_cells(notebook)]
    if found != list(range(1, len(found) + 1)):
        yield f"execution counts are {found}, not 1 to {len(found)}: run make outputs"


def hashes(notebook, path):
    for i, cell in enumerate(code_cells(notebook), start=1):
        if cell.metadata.get("output_sha256") != course.output_hash(cell):
            yield f"code cell {i} or its output was edited: run make outputs"


def errors(notebook, path):
    for i, cell in enumerate(code_cells(notebook), start=1):
        failed = any(output.output_type == "error" for output in cell.outputs)
        if failed and not tagged(cell, "raises-exception"):
            yield f"code cell {i} failed: mend it, or tag it raises-exception"


def metadata(notebook, path):
    expected = {"kernelspec": course.KERNEL, "language_info": {"name": "python"}}
    if notebook.metadata != expected:
        yield (
            f"notebook metadata is {dict(notebook.metadata)}, expected {expected}: "
            "run make outputs"
        )
    for cell in notebook.cells:
        more = set(cell.metadata) - {"tags", "output_sha256"}
        if more:
            yield f"cell {cell.id} has metadata {sorted(more)}: run make outputs"
        for output in cell.get("outputs", []):
            if course.WIDGET in output.get("data", {}):
                yield f"cell {cell.id} stores a widget"
            if output.get("name") == "stderr":
                yield f"cell {cell.id} stores log lines (stderr)"


def tags(notebook, path):
    for cell in notebook.cells:
        unknown = set(cell.metadata.get("tags", [])) - TAGS
        if unknown:
            yield f"cell {cell.id} has tags nobody knows: {sorted(unknown)}"


def ignored(notebook, path):
    cells = code_cells(notebook)
    count = sum(tagged(cell, "nbval-ignore-output") for cell in cells)
    if 3 * count > len(cells):
        yield f"{count} of {len(cells)} outputs are not compared; a third may be"
    for cell in cells:
        if "NBVAL_" in cell.source or "PYTEST_VALIDATE" in cell.source:
            yield f"cell {cell.id} steers nbval by a comment: use a tag"


def size(notebook, path):
    length = len(nbformat.writes(notebook).encode())
    if length > 300_000:
        yield f"{length:,} bytes; 300,000 at most: smaller or fewer pictures"


# ---- how it is laid out


def header(notebook, path):
    first = notebook.cells[0]
    if first.cell_type != "markdown":
        yield "the first cell is no markdown"
        return
    number = path.stem[:2]
    if not re.match(rf"# {number} \S", first.source):
        yield f'the first line is not "# {number} Title"'
    places = [first.source.find(part) for part in HEADER]
    for part, place in zip(HEADER, places, strict=True):
        if place < 0:
            yield f"the header lacks {part}"
    if -1 not in places and places != sorted(places):
        yield f"the header's parts are not in the order {', '.join(HEADER)}"


def setup(notebook, path):
    second = notebook.cells[1]
    if second.cell_type != "code" or not tagged(second, "setup"):
        yield "the second cell is not the code cell tagged setup"
    elif len(second.source.splitlines()) > 8:
        yield "the set-up cell is longer than 8 lines"
    if sum(tagged(cell, "setup") for cell in notebook.cells) > 1:
        yield "there are several set-up cells"


def settings(notebook, path):
    third = notebook.cells[2]
    if third.cell_type != "code" or not tagged(third, "settings"):
        yield "the third cell is not the code cell tagged settings"
        return
    named = 0
    for node in tree(third).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            for name in ast.walk(target):
                if isinstance(name, ast.Name):
                    named += 1
                    if not name.id.isupper():
                        yield f"the setting {name.id} is not in capitals"
        if not targets:
            yield f"the settings cell does more than set: {ast.unparse(node)}"
    if not named:
        yield "the settings cell sets nothing"


def nesting(notebook, path):
    levels = [level for level, _ in headings(notebook)]
    if levels[:1] != [1] or levels.count(1) != 1:
        yield "there must be one heading of level 1, and it comes first"
    for (_, _), (level, words), before in zip(
        headings(notebook), list(headings(notebook))[1:], levels, strict=False
    ):
        if level > before + 1:
            yield f'the heading "{words}" skips a level'


def ending(notebook, path):
    last = [words for level, words in headings(notebook) if level == 2][-3:]
    if last != ENDING:
        yield f"the last headings are {last}, expected {ENDING}"


# ---- code


def plain_python(notebook, path):
    for cell in code_cells(notebook):
        try:
            ast.parse(cell.source)
        except SyntaxError as error:
            yield f"cell {cell.id} is no plain Python (a magic, a shell line?): {error}"
        if not cell.source.strip():
            yield f"cell {cell.id} is empty"


def short_cells(notebook, path):
    for i, cell in enumerate(code_cells(notebook), start=1):
        lines = len(cell.source.splitlines())
        if lines > 25:
            yield f"code cell {i} has {lines} lines; 25 at most"


def no_tricks(notebook, path):
    for cell in code_cells(notebook):
        for node in ast.walk(tree(cell)):
            if (
                isinstance(node, ast.If)
                and isinstance(node.test, ast.Constant)
                and not node.test.value
            ):
                yield "code switched off by `if False`"
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                yield "trust_remote_code runs a stranger's code"


def imports(notebook, path):
    allowed = installed_imports() | set(sys.stdlib_module_names) | {"qlora_helpers"}
    for cell in code_cells(notebook):
        for module in imported(tree(cell)) - allowed:
            yield f"imports {module}, which requirements.txt does not list"


def imported(syntax) -> set[str]:
    """The top-level names of all modules that a syntax tree imports."""
    found = set()
    for node in ast.walk(syntax):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found


def requirements() -> dict[str, str]:
    """Name to exact version, from requirements.txt."""
    text = (env.ROOT / "requirements.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"(?m)^([A-Za-z0-9_.-]+)==([^\s#]+)", text))


@functools.cache
def installed_imports() -> set[str]:
    """The modules that the packages of requirements.txt bring."""
    wanted = {re.sub(r"[-_.]+", "-", name).lower() for name in requirements()}
    return {
        module
        for module, packages in importlib.metadata.packages_distributions().items()
        if wanted & {re.sub(r"[-_.]+", "-", name).lower() for name in packages}
    }


# ---- predictions, checks, exercises


def check_ids(notebook, path):
    number, seen = path.stem[:2], set()
    for cell in code_cells(notebook):
        for name, call in calls(tree(cell), "check"):
            if name not in ("compare", "choose", "holds"):
                continue
            id = getattr(call.args[0], "value", None) if call.args else None
            if not isinstance(id, str) or not re.fullmatch(r"\d\d\.[a-z0-9_]+", id):
                yield f"check.{name} has the id {id!r}, expected '{number}.name'"
            elif not id.startswith(f"{number}."):
                yield f"the id {id} belongs to another notebook"
            elif id in seen:
                yield f"the id {id} is used twice"
            seen.add(id)


def predictions(notebook, path):
    """A guess is a constant, and goes into a check and nowhere else.

    Then blanks (`...`) run wherever guesses do, as every check takes a blank.
    """
    guessed = {}
    for cell in notebook.cells:
        if not tagged(cell, "prediction"):
            continue
        for node in tree(cell).body:
            single = (
                isinstance(node, ast.Assign)
                and len(node.targets) == 1
                and isinstance(node.targets[0], ast.Name)
            )
            if not single or not is_literal(node.value):
                yield f"a prediction is `name = constant`, not `{ast.unparse(node)}`"
            else:
                guessed[node.targets[0].id] = False
        if cell.cell_type != "code" or not tree(cell).body:
            yield f"the prediction cell {cell.id} predicts nothing"
    for cell in code_cells(notebook):
        if tagged(cell, "prediction"):
            continue
        syntax, in_checks = tree(cell), set()
        for name, call in calls(syntax, "check"):
            given = [*call.args[1:2], *(k.value for k in call.keywords)]
            if name in ("compare", "choose"):
                in_checks |= {id(node) for node in given}
        for node in ast.walk(syntax):
            if isinstance(node, ast.Name) and node.id in guessed:
                if id(node) not in in_checks or not isinstance(node.ctx, ast.Load):
                    yield f"the guess {node.id} is used outside compare and choose"
                guessed[node.id] = True
    for name, met in guessed.items():
        if not met:
            yield f"the guess {name} never meets its measurement"


def is_literal(node) -> bool:
    try:
        ast.literal_eval(node)
    except ValueError:
        return False
    return True


def exercises(notebook, path):
    stubs = [i for i, cell in enumerate(notebook.cells) if tagged(cell, "exercise")]
    solutions = [i for i, cell in enumerate(notebook.cells) if tagged(cell, "solution")]
    if solutions != [i + 1 for i in stubs]:
        yield "each exercise cell must be followed by its solution cell"
        return
    for i in stubs:
        stub, solution = notebook.cells[i], notebook.cells[i + 1]
        last = tree(stub).body[-1] if stub.cell_type == "code" else None
        oracle = isinstance(last, ast.Expr) and ast.unparse(last)
        if not oracle or not re.match(r"exercises\.check_\w+\(", oracle):
            yield f"the exercise {stub.id} does not end in exercises.check_...(...)"
        for part in ("Hint", "Solution"):
            if f"<details><summary>{part}</summary>" not in solution.source:
                yield f"the solution {solution.id} lacks a folded {part}"
        if solution.source.count("<details>") != solution.source.count("</details>"):
            yield f"the solution {solution.id} leaves a <details> open"
        if len(solution_code(solution)) != 1:
            yield f"the solution {solution.id} must hold one ```python block"


def solution_code(cell) -> list[str]:
    return re.findall(r"(?ms)^```python\n(.*?)^```", cell.source)


# ---- numbers in prose

UNITS = {  # how a unit is written in a text, and its short form
    **{name: name for name in ("GiB", "MiB", "KiB", "GB", "MB", "kB", "bit", "byte")},
    **{name: name for name in ("%", "ms", "µs", "token", "nat", "sigma")},
    **{"percent": "%", "bits": "bit", "bytes": "byte", "tokens": "token"},
    **{"nats": "nat", "second": "s", "seconds": "s"},
}
FIELD_UNITS = {  # the last word of a recorded field's name, and its unit
    **{"percent": "%", "gib": "GiB", "gb": "GB", "mb": "MB", "bytes": "byte"},
    **{"tokens": "token", "seconds": "s", "microseconds": "µs", "nats": "nat"},
    "second": "token",  # tokens_per_second, in prose "tokens a second"
}
NUMBER = re.compile(
    r"(?<![\w.])(?<![A-Za-z]-)"  # not in NF4, 2.13.0 or Llama-3.1
    r"(?P<digits>\d+(?:,\d{3})*+(?:\.\d+)?+(?:e[-+]?\d+)?+)"
    r"(?!\.?\w)(?!-bit)"  # not in 8B, 2.13.0 or 4-bit
    r"(?P<scale> million| billion|)"
    rf"(?: ?(?P<unit>{'|'.join(sorted(UNITS, reverse=True))})(?!\w))?"
)
# "5 to 11 %" means "5 % to 11 %"
RANGE = re.compile(r"(\d)( (?:to|and|or) )(?=[\d.,]*\d ?(?:%|percent\b))")
KNOWN = re.compile(r"<!-- known: (.*?) -->")
NO_NUMBERS = re.compile(
    r"(?ms)^```.*?^```|`[^`]*`|<[/!a-z][^>]*>"  # code, and tags of HTML
    r"|(?<![\d.,])0\d\b(?![.,]\d)|\]\([^)]*\)"  # notebook 06, targets of links
    r"|\b(?:section|equation)s? \d[\d.]*(?: (?:and|to) \d[\d.]*)?"
    r"|arXiv[: ]\S+|[A-Z][\w.]+,? [(]?(?:19|20)\d\d\b|\d+ (?=[A-Z][a-z]+ 20\d\d)"
    r"|\*\*\d+\. "  # an exercise
    r"|\(\d+ minutes, about \d+ lines?\)"  # the size of an exercise
)


class Number(typing.NamedTuple):
    """A number in a text: as it is written, its value, its unit, its rounding."""

    text: str
    value: float
    unit: str  # "" where none that is known follows
    step: float  # of the last digit: 0.1 for 4.5

    def rounds(self, value) -> bool:
        """Whether a value rounds to this number."""
        if self.text.isdigit() and len(self.text) == 1:
            return abs(value) == self.value  # otherwise almost everything is a 3
        return abs(abs(value) - self.value) <= self.step / 2 * (1 + 1e-9)


def numbers_of(text):
    """The numbers of a text, without signs; words with letters (NF4, 8B) are none."""
    for found in NUMBER.finditer(RANGE.sub(r"\1 %\2", text)):
        digits = found["digits"].replace(",", "")
        step = 10 ** decimal.Decimal(digits).as_tuple().exponent
        if digits.isdigit() and len(digits) > 3:  # 11,000 is 10,950 to 11,050
            zeros = len(digits) - len(digits.rstrip("0"))
            step = 10 ** min(zeros, len(digits) - 3)
        scale = {" million": 1e6, " billion": 1e9, "": 1}[found["scale"]]
        unit = UNITS.get(found["unit"], "")
        yield Number(found[0], float(digits) * scale, unit, step * scale)


def shown_text(cell) -> str:
    """What a cell prints and shows as text; the words about a figure are typed."""
    parts = []
    for output in cell.outputs:
        data = output.get("data", {})
        if not set(PICTURES) & set(data):
            shown = data.get("text/markdown", data.get("text/plain", ""))
            parts += [output.get("text", ""), shown]
    return "\n".join(parts)


def fields(row):
    """(name, value) of each number in a recorded row, of those inside it as well."""
    for name, value in row.items():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                yield from fields(part)
            elif isinstance(part, int | float) and not isinstance(part, bool):
                yield name, part


def recorded_values(cell):
    """(value, unit) of each number in the recordings that a cell reads.

    The ends of an interval are left out: prose quotes results.
    """
    for name, call in calls(tree(cell), "recordings"):
        if name != "read":
            continue
        for row in recordings.read(ast.literal_eval(call.args[0]))["rows"]:
            for field, value in fields(row):
                if "_low_" in field or "_high_" in field:
                    continue
                yield value, FIELD_UNITS.get(field.split("_")[-1], "")


def sources_of(cell):
    """(value, unit, where from) of all that prose may quote from a code cell."""
    if tagged(cell, "settings"):
        for number in numbers_of(cell.source):
            yield number.value, number.unit, "settings"
            if 0 < number.value < 1:
                yield 100 * number.value, "%", "settings"
    if not tagged(cell, "nbval-ignore-output"):
        for number in numbers_of(shown_text(cell)):
            yield number.value, number.unit, "output"
    for value, unit in recorded_values(cell):
        yield value, unit, "recorded"


def same_unit(number, unit, place) -> bool:
    """Whether a number in prose may quote one with this unit.

    A table gives its units in its head, so a number without a unit in an output is one
    of any unit but percent. The fields of recordings name their units.
    """
    if place == "recorded" or "%" in (number.unit, unit):
        return number.unit == unit
    return number.unit == unit or "" in (number.unit, unit)


def quoted(notebook):
    """(cell, number, where it was found or None) of each number in prose.

    A number may be quoted from the settings, and from the recordings and the compared
    outputs of the cells above. Numbers that are known from elsewhere (the literature,
    constants of the field) are marked at the end of their cell, and words may say what
    they are: `<!-- known: 68 of 100, a Gaussian -->`.
    """
    quotable = []
    for cell in notebook.cells[1:]:
        if cell.cell_type == "code":
            quotable += sources_of(cell)
            continue
        known = set(known_of(cell))
        for number in numbers_of(NO_NUMBERS.sub(" ", cell.source)):
            if (number.value, number.unit == "%") in known:
                yield cell, number, "known"
                continue
            fits = (
                place
                for value, unit, place in quotable
                if number.rounds(value) and same_unit(number, unit, place)
            )
            yield cell, number, next(fits, None)


def known_of(cell):
    """(value, whether in percent) of each number that a markdown cell marks."""
    for number in numbers_of(" ".join(KNOWN.findall(cell.source))):
        yield number.value, number.unit == "%"


def numbers(notebook, path):
    """Each number in prose can be looked up, so it cannot differ from the outputs.

    Numbers that are written as words (a third, twenty) are not looked up.
    """
    in_prose = {cell.id: set() for cell in notebook.cells}
    for cell, number, place in quoted(notebook):
        in_prose[cell.id].add((number.value, number.unit == "%"))
        if place is None:
            yield (
                f"cell {cell.id}: {number.text} is in no compared output above, no "
                "setting and no recording: print it (check.say), or mark it as known"
            )
    for cell in notebook.cells[1:]:
        if cell.cell_type == "markdown":
            for value, _ in set(known_of(cell)) - in_prose[cell.id]:
                yield f"cell {cell.id} marks {value:g}, which its text does not hold"


# ---- what a reader meets


def figures(notebook, path):
    for cell, following in itertools.zip_longest(notebook.cells, notebook.cells[1:]):
        shown = False
        for output in cell.get("outputs", []):
            for kind in set(PICTURES) & set(output.get("data", {})):
                shown = True
                alt = output.get("metadata", {}).get(kind, {}).get("alt", "")
                if not alt.strip():
                    yield f"a figure of cell {cell.id} has no alt text: plots.show"
        if shown and (following is None or following.cell_type != "markdown"):
            yield f"no markdown after the figure of cell {cell.id} says what it shows"


def links(notebook, path):
    for text in prose(notebook):
        yield from broken_links(text, path)


def broken_links(text, path):
    """What is wrong with the links of a markdown text in the file `path`."""
    for alt, target in re.findall(r"!\[([^\]]*)\]\(([^)\s]+)[^)]*\)", text):
        if not alt.strip():
            yield f"the picture {target} has no alt text"
    for target in re.findall(r"\]\(([^)\s]+)[^)]*\)", text):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        if not found.exists():
            yield f"the link {target} leads nowhere"
        elif anchor and anchor.lower() not in anchors(found):
            yield f"the link {target} names no heading there"


def anchors(path) -> set[str]:
    """The anchors of a file's headings, as GitHub and Jupyter make them, lower case."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        words = [words for _, words in headings(nbformat.reads(text, as_version=4))]
    else:
        text = re.sub(r"(?ms)^```.*?^```", "", text)
        words = re.findall(r"(?m)^#+ +(.+?)\s*$", text)
    github = {re.sub(r"[^\w\- ]", "", word.lower()).replace(" ", "-") for word in words}
    return github | {word.lower().replace(" ", "-") for word in words}


def private(notebook, path):
    text = nbformat.writes(notebook)
    pictures = [
        output["data"][kind]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        for kind in PICTURES
        if kind in output.get("data", {})
    ]
    for picture in pictures:
        text = text.replace(picture, "")
    for found in PRIVATE.findall(text):
        yield f"holds {found!r}: a machine's own path or a token"
    for host in REGISTRIES:
        if host in text:
            yield f"names the registry host {host}"


RULES = [
    valid,
    counts,
    hashes,
    errors,
    metadata,
    tags,
    ignored,
    size,
    header,
    setup,
    settings,
    nesting,
    ending,
    plain_python,
    short_cells,
    no_tricks,
    imports,
    check_ids,
    predictions,
    exercises,
    numbers,
    figures,
    links,
    private,
]
