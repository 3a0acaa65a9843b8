"""The mutants of ``ghm_d2.losses``: cosmic-ray's operators, one replacement for each place."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import parso
from cosmic_ray.ast import ast_nodes
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names
from parso.tree import NodeOrLeaf

__all__ = ["Mutant", "all_mutants", "difference", "mutated_source", "sample"]

# Replacing an operator by one of another kind dies of a TypeError: it would tell nothing.
_KINDS = [
    {"Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Pow"},
    {"BitOr", "BitAnd", "BitXor"},
    {"LShift", "RShift"},
    {"Eq", "NotEq", "Lt", "LtE", "Gt", "GtE"},
    {"Is", "IsNot"},
    {"USub", "UAdd"},
]
_FAMILIES = {
    "ReplaceBinaryOperator": "binary operator",
    "ReplaceComparisonOperator": "comparison",
    "ReplaceUnaryOperator": "unary operator",
    "NumberReplacer": "number",
    "AddNot": "condition",
    "ReplaceTrueWithFalse": "True / False",
    "ReplaceFalseWithTrue": "True / False",
    "ReplaceAndWithOr": "and / or",
    "ReplaceOrWithAnd": "and / or",
    "ExceptionReplacer": "exception",
    "RemoveDecorator": "decorator",
    "ZeroIterationForLoop": "loop",
    "ReplaceBreakWithContinue": "loop",
    "ReplaceContinueWithBreak": "loop",
}
_STATEMENTS = {"simple_stmt", "if_stmt", "for_stmt", "while_stmt", "try_stmt", "with_stmt"}
_SCOPES = {"funcdef", "classdef"}


@dataclass(frozen=True)
class Mutant:
    """One change of the source.

    Attributes:
        file: name of the module's file.
        scope: dotted name of the function or class that it lies in; "" for the module itself.
        line: the source line where it starts, without indentation.
        place: which of the places of this family on equal lines of the scope.
        family: kind of the change.
        operator, occurrence: cosmic-ray's names of it.
        lines: first and last line of its statement.
        at_import: whether the code runs once, before any test.
    """

    file: str
    scope: str
    line: str
    place: int
    family: str
    operator: str
    occurrence: int
    lines: tuple[int, int]
    at_import: bool

    @property
    def key(self) -> str:
        """Names the mutant whatever stands above it in the file."""
        # A number has two replacements of one operator.
        operator = self.operator.removeprefix("core/")
        if self.family == "number":
            operator += "+-"[self.occurrence % 2]
        return " | ".join([self.file, self.scope, self.line, operator, str(self.place)])


def all_mutants(path: Path, seed: int) -> list[Mutant]:
    """Each place of each family once, with one of its replacements, which ``seed`` chooses."""
    source = path.read_text()
    text = source.splitlines()
    nodes = list(ast_nodes(parso.parse(source)))
    places: dict[tuple, list[tuple[str, int, NodeOrLeaf]]] = {}
    for name in sorted(operator_names()):
        family = _family(name)
        if family is None:
            continue
        operator, occurrence = get_operator(name)(), 0
        for node in nodes:
            for position, _ in operator.mutation_positions(node):
                if not _is_annotation(node):
                    places.setdefault((position, family), []).append((name, occurrence, node))
                occurrence += 1
    seen: dict[tuple, int] = {}
    mutants = []
    for place in sorted(places):
        chosen = random.Random(f"{seed} {path.name} {place}").choice(places[place])
        name, occurrence, node = chosen
        (row, _), family = place
        start = path.name, _scope(node), text[row - 1].strip()
        number = seen[start, family] = seen.get((start, family), -1) + 1
        end = family, name, occurrence, _lines(node), _runs_at_import(node)
        mutants.append(Mutant(*start, number, *end))
    return mutants


def mutated_source(source: str, mutant: Mutant) -> str:
    """``source`` with the change of ``mutant``."""
    return mutate_code(source, get_operator(mutant.operator)(), mutant.occurrence)


def difference(before: str, after: str) -> tuple[str, str]:
    """The lines of two sources that differ, without indentation."""
    old, new = before.splitlines(), after.splitlines()
    while old and new and old[0] == new[0]:
        del old[0], new[0]
    while old and new and old[-1] == new[-1]:
        del old[-1], new[-1]
    old, new = (" ".join(line.strip() for line in lines) for lines in (old, new))
    return old, new


def sample(mutants: list[Mutant], size: int, seed: int) -> list[Mutant]:
    """``size`` of the mutants in random order; all of them, where there are no more."""
    return random.Random(seed).sample(mutants, min(size, len(mutants)))


def _family(name: str) -> str | None:
    operator, _, rest = name.removeprefix("core/").partition("_")
    names = set(rest.split("_")) - {"Delete"}
    if operator == "ReplaceUnaryOperator" and rest.startswith("Delete"):
        return _FAMILIES[operator]
    if len(names) == 2 and not any(names <= kind for kind in _KINDS):
        return None
    return _FAMILIES.get(operator)


def _ancestors(node: NodeOrLeaf) -> Iterator[tuple[NodeOrLeaf, NodeOrLeaf]]:
    """(parent, child) pairs upwards."""
    while node.parent is not None:
        yield node.parent, node
        node = node.parent


def _is_annotation(node: NodeOrLeaf) -> bool:
    for parent, child in _ancestors(node):
        if parent.type == "annassign" and parent.children[1] is child:
            return True
        if parent.type == "tfpdef" and parent.children[-1] is child:
            return True
        if parent.type == "funcdef" and parent.annotation is child:
            return True
    return False


def _scope(node: NodeOrLeaf) -> str:
    scopes = [node] if node.type in _SCOPES else []
    scopes += [parent for parent, _ in _ancestors(node) if parent.type in _SCOPES]
    return ".".join(scope.name.value for scope in reversed(scopes))


def _runs_at_import(node: NodeOrLeaf) -> bool:
    if node.type == "decorator":
        return True
    for parent, child in _ancestors(node):
        if parent.type == "funcdef":
            return parent.children[-1] is not child  # a default, not the body
    return True


def _lines(node: NodeOrLeaf) -> tuple[int, int]:
    """The lines of the smallest statement around it; of a compound one, up to the node's end."""
    end = node.end_pos[0]
    for parent, child in [(node, None), *_ancestors(node)]:
        if parent.type in _STATEMENTS:
            if parent.type == "simple_stmt":
                end = parent.end_pos[0] - 1  # it ends with the line break
            elif child is not None and child.type != "suite":
                end = child.end_pos[0]
            return parent.start_pos[0], max(end, parent.start_pos[0])
    return node.start_pos[0], end
