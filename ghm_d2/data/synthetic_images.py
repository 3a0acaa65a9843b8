"""The pictures of the default data set: small, seeded, with the imbalance that GHM is about.

A picture holds zero to four labelled shapes (circle, square, and rarely a triangle) on a textured
background full of things that are not objects: dots and strokes (easy negatives), hollow or
partial look-alikes (hard negatives). Most objects are clean; some are faint, truncated,
overlapped, crossed by a stroke, or lie between two classes and have a label that no model can
know. What is not the point is kept simple, so that a small network learns it on a CPU in minutes:
everything drawn is brighter than the background, each class has its own hue (which its look-alikes
share), and shapes stand nearly upright.

The pixels are a function of (`SEED`, split, index) alone: the raw output of PCG64, whose stream
NumPy guarantees, and integer arithmetic, so that every machine draws the same pictures.
"""

import math
from dataclasses import dataclass

import numpy as np

# Raise it with every change of the pixels or of the labels: older folders are then redone.
VERSION = 1
SEED = 20190127
IMAGE_SIZE = 128  # pixels, both sides
SPLITS = {"train": 600, "val": 200}  # number of images
CLASSES = ("circle", "square", "triangle")
CLASS_PERCENT = (72, 20, 8)
OBJECTS_PER_IMAGE_PERCENT = (6, 24, 30, 24, 16)  # for 0, 1, 2, 3, 4 objects
DIFFICULTY_PERCENT = {
    "clean": 74,
    "faint": 8,
    "truncated": 6,
    "overlapping": 5,
    "crossed": 4,
    "between": 3,
}
LOOK_ALIKES = ("ring", "frame", "cross", "half")

# Lengths are in eighths of a pixel. Directions are 64ths of a turn: integer vectors of length 1024.
_UNIT = 8
_TURNS = [
    (round(1024 * math.cos(math.pi * k / 32)), round(1024 * math.sin(math.pi * k / 32)))
    for k in range(64)
]


@dataclass(frozen=True)
class SyntheticObject:
    """One labelled object in a picture of `make_image`.

    Attributes:
        category: index into `CLASSES`.
        box: (x, y, width, height) in pixels, the tight box of the visible pixels.
        area: number of visible pixels.
        difficulty: a key of `DIFFICULTY_PERCENT`.
    """

    category: int
    box: tuple[int, int, int, int]
    area: int
    difficulty: str


class _Random:
    """Integers from the raw 64-bit stream of PCG64 (the distributions of NumPy may change)."""

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(key))

    def integer(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return low + int(self._bits.random_raw()) % (high - low + 1)

    def integers(self, low: int, high: int, shape: tuple[int, ...]) -> np.ndarray:
        raw = self._bits.random_raw(math.prod(shape)).reshape(shape)
        return (raw % np.uint64(high - low + 1)).astype(np.int64) + low

    def choose(self, percents: tuple[int, ...]) -> int:
        """An index, drawn with the given percentages."""
        return int(np.searchsorted(np.cumsum(percents), self.integer(0, 99), side="right"))


def _inside(kind: str, u: np.ndarray, v: np.ndarray, r: int) -> np.ndarray:
    """Whether the points (u, v), in the shape's own axes, lie in the shape of radius r."""
    if kind == "circle":
        return u * u + v * v <= r * r
    if kind == "square":
        return np.maximum(abs(u), abs(v)) <= r * 57 // 64
    if kind == "triangle":
        depth = r * 5 // 8
        return (-v <= depth) & (887 * abs(u) + 512 * v <= 1024 * depth)
    if kind == "between":  # a superellipse, half circle and half square
        p, q, s = u >> 6, v >> 6, (r * 15 // 16) >> 6
        return p**4 + q**4 <= s**4
    if kind == "stroke":
        return (abs(u) <= r) & (abs(v) <= r // 16)
    if kind == "ring":
        return _inside("circle", u, v, r) & ~_inside("circle", u, v, r * 5 // 8)
    if kind == "frame":
        return _inside("square", u, v, r) & ~_inside("square", u, v, r * 5 // 8)
    if kind == "cross":
        near, far = np.minimum(abs(u), abs(v)), np.maximum(abs(u), abs(v))
        return (near <= r * 9 // 32) & (far <= r)
    assert kind == "half", kind
    return _inside("circle", u, v, r) & (v >= 0)


class _Canvas:
    """A picture under construction and, for each pixel, the object that it shows (-1: none)."""

    def __init__(self, rng: _Random) -> None:
        self._rng = rng
        base = rng.integer(60, 100) + rng.integers(-12, 12, (3,))
        texture = sum(self._noise(cell, depth) for cell, depth in ((32, 22), (16, 14), (8, 8)))
        self.pixels = (
            base + np.stack([texture] * 3, axis=-1) + self._noise(32, 10)[..., None] * [1, 0, -1]
        )
        self.owner = np.full((IMAGE_SIZE, IMAGE_SIZE), -1)

    def _noise(self, cell: int, depth: int) -> np.ndarray:
        """Bilinear value noise in [-depth, depth] with one knot every `cell` pixels."""
        knots = self._rng.integers(-depth, depth, (IMAGE_SIZE // cell + 1,) * 2)
        index, step = np.divmod(np.arange(IMAGE_SIZE), cell)
        rows = knots[index] * (cell - step)[:, None] + knots[index + 1] * step[:, None]
        return (rows[:, index] * (cell - step) + rows[:, index + 1] * step) // cell**2

    def _colour(self, x: int, y: int, hue: int, strength: int) -> np.ndarray:
        """A colour brighter than what is seen at (x, y), mostly in the channels that `hue` names.

        Args:
            hue: 0, 1 or 2 for one channel, as the categories have it; 3 for the first two alike.
            strength: of the contrast, in percent.
        """
        column, row = (min(max(c // _UNIT, 0), IMAGE_SIZE - 1) for c in (x, y))
        strong = np.array([hue in (0, 3), hue in (1, 3), hue == 2])
        high, low = self._rng.integers(80, 130, (3,)), self._rng.integers(10, 40, (3,))
        return self.pixels[row, column] + np.where(strong, high, low) * strength // 100

    def draw(
        self, kind: str, x: int, y: int, r: int, hue: int, strength: int = 100, owner: int = -1
    ) -> None:
        """Draw one shape, antialiased by 4 x 4 samples a pixel; it hides what lies below it."""
        reach = r * 3 // 2 // _UNIT + 2
        x0, x1 = max(x // _UNIT - reach, 0), min(x // _UNIT + reach, IMAGE_SIZE)
        y0, y1 = max(y // _UNIT - reach, 0), min(y // _UNIT + reach, IMAGE_SIZE)
        dx = np.arange(x0 * _UNIT + 1, x1 * _UNIT, 2)[None, :] - x
        dy = np.arange(y0 * _UNIT + 1, y1 * _UNIT, 2)[:, None] - y
        tilt = 31 if kind in ("stroke", "half") else 2
        cos, sin = _TURNS[self._rng.integer(-tilt, tilt)]
        mask = _inside(kind, dx * cos + dy * sin, dy * cos - dx * sin, r * 1024)
        cover = mask.reshape(y1 - y0, 4, x1 - x0, 4).sum(axis=(1, 3))
        colour = self._colour(x, y, hue, strength)
        patch = self.pixels[y0:y1, x0:x1]
        patch[...] = (patch * (16 - cover[..., None]) + colour * cover[..., None] + 8) // 16
        self.owner[y0:y1, x0:x1][cover >= 8] = owner

    def finish(self) -> np.ndarray:
        grain = self._rng.integers(-4, 4, self.pixels.shape)
        return np.clip(self.pixels + grain, 0, 255).astype(np.uint8)


def _place(
    rng: _Random, taken: list[tuple[int, int, int]], r: int, difficulty: str = "clean"
) -> tuple[int, int] | None:
    """A centre for a shape of radius r (a triangle reaches 5/4 r); None where no room was found."""
    reach, side = r * 5 // 4, IMAGE_SIZE * _UNIT
    for _ in range(40):
        x, y = (rng.integer(reach, side - reach) for _ in "xy")
        if difficulty == "truncated":  # the centre stays in the picture, so about half is seen
            along = rng.integer(0, r // 3)
            edge = along if rng.integer(0, 1) else side - along
            x, y = (edge, y) if rng.integer(0, 1) else (x, edge)
        gaps = [
            math.isqrt((x - a) ** 2 + (y - b) ** 2) - reach - b_reach for a, b, b_reach in taken
        ]
        if difficulty == "overlapping" and taken:
            # The nearest neighbour is partly hidden, but its centre stays visible.
            if -reach < 2 * min(gaps) < -reach // 2 and sum(gap < 0 for gap in gaps) == 1:
                return x, y
        elif all(gap >= 0 for gap in gaps):
            return x, y
    return None


def make_image(split: str, index: int) -> tuple[np.ndarray, list[SyntheticObject]]:
    """Draw one picture of the data set.

    Args:
        split: a key of `SPLITS`.
        index: number of the picture, 0 or more.

    Returns:
        The picture, uint8 RGB of shape (`IMAGE_SIZE`, `IMAGE_SIZE`, 3), and its labelled objects.
    """
    rng = _Random(SEED, list(SPLITS).index(split), index)
    canvas = _Canvas(rng)
    taken: list[tuple[int, int, int]] = []
    plan = []
    for _ in range(rng.choose(OBJECTS_PER_IMAGE_PERCENT)):
        difficulty = list(DIFFICULTY_PERCENT)[rng.choose(tuple(DIFFICULTY_PERCENT.values()))]
        category, r = rng.choose(CLASS_PERCENT), rng.integer(7 * _UNIT, 15 * _UNIT)
        if difficulty == "between":
            category = rng.integer(0, 1)
        if difficulty == "overlapping" and not taken:
            difficulty = "clean"
        if (centre := _place(rng, taken, r, difficulty)) is not None:
            plan.append((category, *centre, r, difficulty))
            taken.append((*centre, r * 5 // 4))

    for _ in range(rng.integer(8, 16)):  # easy negatives, below everything else
        kind, r = (
            ("stroke", rng.integer(80, 240))
            if rng.integer(0, 2) == 0
            else ("circle", rng.integer(8, 20))
        )
        x, y = (rng.integer(0, IMAGE_SIZE * _UNIT - 1) for _ in "xy")
        canvas.draw(kind, x, y, r, hue=rng.integer(0, 3), strength=rng.integer(30, 80))
    for _ in range(rng.integer(0, 2)):  # hard negatives
        r = rng.integer(7 * _UNIT, 15 * _UNIT)
        if (centre := _place(rng, taken, r)) is not None:
            kind = LOOK_ALIKES[rng.integer(0, len(LOOK_ALIKES) - 1)]
            canvas.draw(kind, *centre, r, hue=rng.integer(0, 2))
            taken.append((*centre, r * 5 // 4))
    for number, (category, x, y, r, difficulty) in enumerate(plan):
        kind, hue = ("between", 3) if difficulty == "between" else (CLASSES[category], category)
        strength = 25 if difficulty == "faint" else 100
        canvas.draw(kind, x, y, r, hue, strength, owner=number)
    for _, x, y, r, difficulty in plan:
        if difficulty == "crossed":
            canvas.draw("stroke", x, y, r * 2, hue=rng.integer(0, 3))

    objects = []
    for number, (category, *_, difficulty) in enumerate(plan):
        rows, columns = np.nonzero(canvas.owner == number)
        x, y = int(columns.min()), int(rows.min())
        box = (x, y, int(columns.max()) + 1 - x, int(rows.max()) + 1 - y)
        objects.append(SyntheticObject(category, box, len(rows), difficulty))
    return canvas.finish(), objects
