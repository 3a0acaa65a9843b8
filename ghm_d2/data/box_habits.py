"""What boxes have in common where they are not x, y, width, height in pixels."""

import math

from .checks import Problem

__all__ = ["BoxHabits"]


class BoxHabits:
    """Whether boxes look as if they were not x, y, width, height in pixels."""

    def __init__(self) -> None:
        self.number = self.fractions = self.corners = self.away = self.leave = self.percent = 0
        self.first: dict[str, str] = {}

    def see(self, box: list[float], width: float, height: float, where: str) -> None:
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
            self.first.setdefault("fraction", where)
        if x < w <= width + 1 and y < h <= height + 1 and min(x, y) >= -1:
            self.corners += 1
            self.away += x > 0.05 * width and y > 0.05 * height
            if x + w > width + 1 or y + h > height + 1:
                self.leave += 1
                self.first.setdefault("corner", where)
        self.percent += max(x + w, y + h) <= 101 and 150 < min(width, height) < math.inf

    def problems(self) -> list[Problem]:
        """What nearly all of the boxes have in common."""
        nearly_all = 0.95 * self.number
        if self.fractions >= max(nearly_all, 1):
            return [Problem("fraction box", self.first["fraction"])]
        if self.corners >= nearly_all and self.leave >= max(1, 0.1 * self.number):
            return [Problem("corner box", self.first["corner"])]
        found = []
        if self.number >= 20:
            if self.corners >= nearly_all and self.away >= self.number / 2:
                found.append(Problem("boxes like corners", f"all {self.number} boxes"))
            if self.percent == self.number:
                found.append(Problem("boxes like percent", f"all {self.number} boxes"))
        return found
