"""What boxes have in common where they are not x, y, width, height in pixels."""

import math
from collections.abc import Callable

from .checks import Problem

_FEW, _MANY = 4, 20


class BoxHabits:
    """Whether boxes look as if they were not x, y, width, height in pixels."""

    def __init__(self) -> None:
        self.number = self.fractions = self.corners = self.away = self.leave = self.percent = 0
        self.first: dict[str, str] = {}

    def see(self, box: list[float], width: float, height: float, where: Callable[[], str]) -> None:
        """
        Args:
            box: as written.
            width, height: of its image in pixels; infinite where they are not known.
            where: the annotation, for a message.
        """
        x, y, w, h = box
        if min(w, h) <= 0:
            return
        self.number += 1
        if min(box) >= 0 and max(x, y, w, h) <= 1 and min(width, height) > 2:
            self.fractions += 1
            self._remember("fraction", box, where)
        if x < w <= width + 1 and y < h <= height + 1 and min(x, y) >= -1:
            self.corners += 1
            self.away += x > 0.05 * width and y > 0.05 * height
            if x + w > width + 1 or y + h > height + 1:
                self.leave += 1
                self._remember("corner", box, where)
        self.percent += max(x + w, y + h) <= 101 and 150 < min(width, height) < math.inf

    def _remember(self, kind: str, box: list[float], where: Callable[[], str]) -> None:
        if kind not in self.first:
            self.first[kind] = f"{where()} has the bbox {box!r}"

    def problems(self) -> list[Problem]:
        """What nearly all of the boxes have in common."""
        nearly_all = 0.95 * self.number
        if self.fractions >= max(nearly_all, 1):
            return [Problem("fraction box", self.first["fraction"])]
        found = []
        if self.corners >= nearly_all and self.leave >= max(1, 0.1 * self.number):
            # A few boxes may look like corners by chance.
            kind = "corner box" if self.number >= _FEW else "boxes like corners"
            found.append(Problem(kind, self.first["corner"]))
        elif self.number >= _MANY:
            if self.corners >= nearly_all and self.away >= self.number / 2:
                found.append(Problem("boxes like corners", f"all {self.number} boxes"))
            if self.percent == self.number:
                found.append(Problem("boxes like percent", f"all {self.number} boxes"))
        return found
