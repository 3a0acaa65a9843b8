"""The layers of the package: what imports what, read from the source.

A file may import from its own room and from those below it. So there is no circle between rooms.
"""

import ast
import sys
from collections import defaultdict

from tests.tiny import ROOT

# From the bottom to the top; a file at the root of the package is a room of its own.
LAYERS = (
    ("errors", "markdown", "randomness", "config"),
    ("config_files", "files"),
    ("plotting", "provenance", "run_logs", "run_parts"),
    ("run_folder",),
    ("losses",),
    ("data", "checkpoint"),
    ("modeling",),
    ("engine",),
    ("analysis", "model_zoo", "deploy"),
    ("report", "ablation", "audit"),
    ("cli",),
    ("__main__",),
)
# Two arrows that run upwards, each with its reason; more would be a sign of a wrong place.
UPWARDS = {
    ("engine", "analysis"): "the statistics of the gradients are a hook of the trainer",
    ("engine", "model_zoo"): "weights from a zoo are checked from the moment it is imported",
}
# Kept by the root itself; every other name of the root is a room, or imports rooms.
OF_THE_ROOT = {"__version__", "__file__"}

PACKAGE = ROOT / "ghm_d2"
MODULES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
    for p in PACKAGE.rglob("*.py")
}


def room(module):
    return (*module.split("."), "(root)")[1]


def imported(module, path):
    """The modules of this package that a module imports, anywhere in it."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                if not (base == "ghm_d2" and alias.name in OF_THE_ROOT):
                    yield full if full in MODULES else base


def arrows():
    """(room, imported room) to the files in which it stands, for the rooms of this package."""
    found = defaultdict(set)
    for module, path in MODULES.items():
        for target in imported(module, path):
            pair = room(module), room(target)
            if target.split(".")[0] == "ghm_d2" and pair[0] != pair[1]:
                found[pair].add(path.relative_to(ROOT).as_posix())
    return found


ARROWS = arrows()
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def test_every_room_has_its_layer():
    rooms = {room(module) for module in MODULES} - {"(root)"}
    assert rooms <= set(LEVEL)
    assert len(ARROWS) > 30  # the walk sees something


def test_no_import_runs_upwards():
    wrong = {
        pair: sorted(files)
        for pair, files in ARROWS.items()
        if pair not in UPWARDS and "(root)" not in pair and LEVEL[pair[1]] >= LEVEL[pair[0]]
    }
    assert not wrong
    assert len(UPWARDS) <= 2 and set(UPWARDS) <= set(ARROWS), "an exception is not needed any more"


def test_no_circle_between_rooms():
    """Also not by way of the exceptions."""
    below = defaultdict(set)
    for above, under in ARROWS:
        below[above].add(under)

    def reached(start):
        seen, todo = set(), [start]
        while todo:
            for name in below[todo.pop()] - seen:
                seen.add(name)
                todo.append(name)
        return seen

    assert not [name for name in list(below) if name in reached(name)]


def test_the_root_is_imported_by_commands_alone():
    """Its names import the rooms, so that a room that takes them would import itself."""
    assert {above for above, under in ARROWS if under == "(root)"} <= {"cli", "__main__"}


def test_the_losses_import_torch_alone():
    for module, path in MODULES.items():
        if room(module) == "losses":
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not node.level:
                    names = [node.module]
                for name in names:
                    top = name.split(".")[0]
                    assert top in {"torch", "triton"} or top in sys.stdlib_module_names, (
                        f"{path}: {name}"
                    )
