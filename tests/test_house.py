"""The package is small, its imports run one way, and README says where things are."""

import ast
import re

import pytest

from qlora_helpers import env

PACKAGE = env.ROOT / "qlora_helpers"
MODULES = sorted(PACKAGE.rglob("*.py"))
TABLE = re.compile(r"(?ms)^\| in `qlora_helpers/` \|.*?\n\n")


def room(path) -> str:
    """The folder of `qlora_helpers/` that a module is in, or the module itself."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path) -> set[str]:
    """The rooms that a module imports from, inside its functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        assert not node.level, f"{path}: imports are absolute"
        package, *below = node.module.split(".")
        if package == "qlora_helpers":
            found |= {below[0]} if below else {alias.name for alias in node.names}
    return found - {room(path)}


def order() -> dict[str, int]:
    """The row of README's table in which each room stands."""
    [table] = TABLE.findall((env.ROOT / "README.md").read_text(encoding="utf-8"))
    rows = enumerate(re.findall(r"(?m)^\| (`.*?`) \|", table))
    return {
        name.strip("/").removesuffix(".py"): number
        for number, names in rows
        for name in re.findall(r"`([\w./]+)`", names)
        if name != "qlora_helpers/"
    }


def test_readme_names_every_module_and_folder():
    assert set(order()) == {room(path) for path in MODULES} - {"__init__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_run_down_the_readmes_table_and_never_back(path):
    rows = order() | {"__init__": -1}
    for name in imported(path):
        assert rows[name] > rows[room(path)], f"{room(path)} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_modules_are_short_and_say_what_is_in_them(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 250
    assert re.match(r'"""[A-Z].{15,}[.?](\n|""")', text)
