"""The floors of CONTRIBUTING.md: no import climbs, no circle between folders, every library has its owner."""

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "treepo_mcore"


@cache
def floors():
    """Room -> its floor, counted from the lowest, as the table of CONTRIBUTING.md has them."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", text, flags=re.M)
    return {room: int(number) for number, rooms in rows for room in re.findall(r"`([a-z_]+)", rooms)}


def room(module):
    """Of treepo_mcore.x.y: x."""
    return module.split(".")[1] if "." in module else module


@cache
def imports():
    """(file's module, imported module) of every import of the package, also those inside functions, but not those for
    annotations alone."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(file.read_text())
        skipped = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if node in skipped:
                continue
            if isinstance(node, ast.Import):
                found += [(module, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                whole = (PACKAGE / Path(*node.module.split(".")[1:])).is_dir() and node.module.startswith(
                    "treepo_mcore"
                )
                found += [(module, f"{node.module}.{alias.name}" if whole else node.module) for alias in node.names]
    return found


def own():
    return [(a, b) for a, b in imports() if b.split(".")[0] == "treepo_mcore"]


def test_every_room_has_a_floor():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert rooms - {"__init__", "__main__"} == set(floors())


def test_no_import_climbs():
    climbing = [
        f"{a} -> {b}"
        for a, b in own()
        if room(a) in floors() and room(b) in floors() and floors()[room(a)] < floors()[room(b)]
    ]
    assert not climbing, climbing


def test_no_circle_between_folders():
    graph = {}
    for a, b in own():
        if room(a) != room(b):
            graph.setdefault(room(a), set()).add(room(b))
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    ("library", "owners"),
    [
        ("vllm", {"treepo_mcore.engine.vllm"}),
        ("megatron", {"treepo_mcore.actor"}),
        ("wandb", {"treepo_mcore.observe.trackers"}),
        ("math_verify", {"treepo_mcore.rewards"}),
    ],
)
def test_a_library_is_imported_by_its_owner_alone(library, owners):
    users = {a for a, b in imports() if b.split(".")[0] == library}
    assert users, f"nobody imports {library}"
    assert not [user for user in users if not any(user == owner or user.startswith(f"{owner}.") for owner in owners)]


def test_only_the_command_line_imports_the_planner():
    assert {room(a) for a, b in own() if room(b) == "plan"} <= {"plan", "cli"}


@pytest.mark.parametrize("light", ["config", "model", "tree", "grow", "records", "launch", "plan.plan"])
def test_rooms_that_start_without_torch(light):
    code = f"import pkgutil, importlib, sys; room = importlib.import_module('treepo_mcore.{light}'); "
    code += "files = pkgutil.iter_modules(getattr(room, '__path__', [])); "
    code += "[importlib.import_module(f'{room.__name__}.{file.name}') for file in files]; "
    code += "print([name for name in ('torch', 'vllm', 'megatron') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
