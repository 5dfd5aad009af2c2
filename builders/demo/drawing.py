"""The demo world's pictures: one to four coloured shapes on a plain or noisy background.

A `Scene` is sampled from a `random.Random` and drawn by `render`, both deterministic. Places and centres are fractions
of the picture's width and height, sizes fractions of its shorter side.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Rgb = tuple[int, int, int]

KINDS = ("circle", "square", "triangle", "star")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "white")
GRID = 3  # places are the cells of a 3 × 3 grid, numbered in reading order

# Each colour is a mix of its anchors, which include the pure colours drawing programs offer, with a little jitter.
ANCHORS: dict[str, tuple[Rgb, ...]] = {
    "red": ((255, 0, 0), (200, 30, 35), (230, 55, 55)),
    "green": ((0, 128, 0), (0, 200, 0), (60, 170, 80), (0, 255, 0)),
    "blue": ((0, 0, 255), (40, 90, 220), (30, 60, 160)),
    "yellow": ((255, 255, 0), (240, 215, 40), (250, 232, 90)),
    "purple": ((128, 0, 128), (150, 60, 190), (110, 40, 160)),
    "orange": ((255, 165, 0), (245, 130, 25), (255, 140, 0)),
    "black": ((0, 0, 0), (40, 40, 40)),
    "white": ((255, 255, 255), (238, 238, 238)),
}
JITTER = 8  # levels of 255
BACKGROUND_CONTRAST = 120.0  # least Euclidean RGB distance between a shape and the background
BACKGROUNDS: tuple[Rgb, ...] = (
    (255, 255, 255), (250, 248, 240), (235, 235, 235), (200, 200, 200), (128, 128, 128), (60, 60, 60), (0, 0, 0),
    (255, 225, 225), (225, 255, 230), (220, 235, 255), (255, 250, 205), (240, 225, 250), (200, 180, 150),
    (30, 40, 80), (20, 70, 50), (90, 50, 40), (120, 170, 190), (170, 120, 140), (0, 128, 128), (255, 192, 203),
)  # fmt: skip

# Circumradius of a shape whose area is 1.
STAR_INNER = 0.45
_STAR_AREA = 5 * STAR_INNER * math.sin(math.pi / 5)
CIRCUMRADIUS = {
    "circle": math.sqrt(1 / math.pi),
    "square": math.sqrt(0.5),
    "triangle": math.sqrt(4 / (3 * math.sqrt(3))),
    "star": math.sqrt(1 / _STAR_AREA),
}
MIN_SIZE, MAX_SIZE = 0.2, 0.5
PLACE_MARGIN = 0.05  # least distance of a centre from the lines between places
TIE_MARGIN = 0.1  # least distance, across, of two centres in one place: reading order stays clear


@dataclass(frozen=True, slots=True)
class Shape:
    """One shape: centre ``x``, ``y`` in [0, 1]; ``size`` the root of its area over the shorter side; angle in rad."""

    kind: str
    colour: str
    x: float
    y: float
    size: float
    rotation: float
    rgb: Rgb

    @property
    def place(self) -> int:
        """Cell of the 3 × 3 grid, 0 (top left) … 8 (bottom right)."""
        return int(self.y * GRID) * GRID + int(self.x * GRID)

    @property
    def radius(self) -> float:
        """Circumradius over the picture's shorter side."""
        return self.size * CIRCUMRADIUS[self.kind]


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture to draw, ``width`` × ``height`` pixels; ``shapes`` in reading order by place, then left to right."""

    width: int
    height: int
    background: Rgb
    noise: str
    noise_level: int
    noise_seed: int
    shapes: tuple[Shape, ...]

    def find(self, colour: str | None = None, kind: str | None = None, place: int | None = None) -> list[Shape]:
        """The shapes that agree with every given property."""
        return [
            shape
            for shape in self.shapes
            if (colour is None or shape.colour == colour)
            and (kind is None or shape.kind == kind)
            and (place is None or shape.place == place)
        ]


def _mix(rng: random.Random, name: str) -> Rgb:
    anchors = ANCHORS[name]
    first, second, weight = rng.choice(anchors), rng.choice(anchors), rng.random()
    values = [a + (b - a) * weight + rng.uniform(-JITTER, JITTER) for a, b in zip(first, second, strict=True)]
    red, green, blue = (min(255, max(0, round(value))) for value in values)
    return red, green, blue


def _distance(first: Rgb, second: Rgb) -> float:
    return math.dist(first, second)


def _background(rng: random.Random, colours: list[Rgb]) -> Rgb | None:
    for _ in range(30):
        if rng.random() < 0.7:
            base = rng.choice(BACKGROUNDS)
        else:
            base = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        if all(_distance(base, colour) >= BACKGROUND_CONTRAST for colour in colours):
            return base
    return None


def _clear_of_lines(value: float) -> bool:
    return all(abs(value - line / GRID) >= PLACE_MARGIN for line in range(1, GRID))


def _fits(shape: Shape, others: list[Shape], width: int, height: int) -> bool:
    """Inside the picture, clear of the lines between places, apart from ``others``."""
    short = min(width, height)
    rx, ry = shape.radius * short / width, shape.radius * short / height
    if not (rx < shape.x < 1 - rx and ry < shape.y < 1 - ry):
        return False
    if not (_clear_of_lines(shape.x) and _clear_of_lines(shape.y)):
        return False
    for other in others:
        apart = math.hypot((shape.x - other.x) * width, (shape.y - other.y) * height) / short
        if apart < (shape.radius + other.radius) * 1.04 + 0.01:
            return False
        if shape.place == other.place and abs(shape.x - other.x) < TIE_MARGIN:
            return False
    return True


def _rotation(rng: random.Random, kind: str) -> float:
    if kind == "circle" or rng.random() < 0.4:
        return 0.0
    limit = {"square": 0.4, "triangle": 0.6, "star": math.pi / 5}[kind]
    return rng.uniform(-limit, limit)


def _size(rng: random.Random, biggest: float, manner: str) -> float:
    """From `MIN_SIZE` to ``biggest``; ``manner`` "small" and "large" keep near one end, far enough from the other's."""
    if manner == "small":
        return rng.uniform(MIN_SIZE, 1.12 * MIN_SIZE)
    if manner == "large":
        return rng.uniform(0.85 * biggest, biggest)
    return math.exp(rng.uniform(math.log(MIN_SIZE), math.log(biggest)))


def _shapes(rng: random.Random, count: int, width: int, height: int) -> list[Shape] | None:
    few_colours, few_kinds = rng.sample(COLOURS, rng.choice((1, 2, 4))), rng.sample(KINDS, rng.choice((1, 2, 4)))
    # Sizes by chance, all the same, or one clearly larger or smaller than the others, so that there is much to compare.
    first, others = rng.choices(
        (("any", "any"), ("any", "same"), ("large", "small"), ("small", "large")), (40, 10, 30, 20)
    )[0]
    biggest = MAX_SIZE if count == 1 else 0.42 if count == 2 else 0.38
    size = _size(rng, biggest, first)
    shapes: list[Shape] = []
    for number in range(count):
        kind = rng.choice(few_kinds if rng.random() < 0.8 else KINDS)
        colour = rng.choice(few_colours if rng.random() < 0.7 else COLOURS)
        rotation, rgb = _rotation(rng, kind), _mix(rng, colour)
        for _attempt in range(40):
            if number == 0 or others != "same":
                size = _size(rng, biggest, others if number else first)
            shape = Shape(kind, colour, rng.random(), rng.random(), size, rotation, rgb)
            if _fits(shape, shapes, width, height):
                shapes.append(shape)
                break
        else:
            return None
    return sorted(shapes, key=lambda shape: (shape.place, shape.x))


def _canvas(rng: random.Random) -> tuple[int, int]:
    """Width and height in pixels: 128 … 512 along the shorter side's usual range, up to 7:5 wide or tall."""
    side = (
        rng.choice((128, 160, 192, 224, 256, 256, 256, 320, 384, 512)) if rng.random() < 0.5 else rng.randint(128, 320)
    )
    if rng.random() < 0.55:
        return side, side
    other = round(side * rng.uniform(1.0, 1.4))
    return (side, other) if rng.random() < 0.5 else (other, side)


def sample_scene(rng: random.Random, count: int | None = None) -> Scene:
    """A random scene of ``count`` shapes (1 … 4; random when not given)."""
    wanted = count or rng.randint(1, 4)
    while True:
        width, height = _canvas(rng)
        shapes = _shapes(rng, wanted, width, height)
        background = _background(rng, [shape.rgb for shape in shapes]) if shapes else None
        if shapes and background:
            break
    noise = rng.choices(("none", "fine", "grey", "blotches"), (50, 18, 16, 16))[0]
    return Scene(width, height, background, noise, rng.randint(4, 40), rng.getrandbits(32), tuple(shapes))


def _noisy_background(scene: Scene) -> Image.Image:
    """Noise uniform in ± ``noise_level``: per pixel and channel, per pixel, or in soft blotches."""
    random_levels = np.random.Generator(np.random.SFC64(scene.noise_seed))
    width, height, level = scene.width, scene.height, scene.noise_level
    if scene.noise == "blotches":
        shape: tuple[int, ...] = (max(2, height // 24), max(2, width // 24), 3)
    else:
        shape = (height, width, 3 if scene.noise == "fine" else 1)
    raw = np.frombuffer(random_levels.bytes(math.prod(shape)), np.uint8).reshape(shape).astype(np.int16)
    offsets = (raw - 128) * np.int16(level) >> np.int16(7)
    levels = np.clip(np.asarray(scene.background, np.int16) + offsets, 0, 255).astype(np.uint8)
    picture = Image.fromarray(levels, "RGB")
    return picture.resize((width, height), Image.Resampling.BILINEAR) if scene.noise == "blotches" else picture


def outline(shape: Shape, width: int, height: int) -> list[tuple[float, float]]:
    """The corners of a square, triangle or star in pixels of a ``width`` × ``height`` picture."""
    radius = shape.radius * min(width, height)
    corners = {"square": 4, "triangle": 3, "star": 10}[shape.kind]
    start = -math.pi / 4 if shape.kind == "square" else -math.pi / 2
    points = []
    for corner in range(corners):
        reach = radius * STAR_INNER if shape.kind == "star" and corner % 2 else radius
        angle = start + shape.rotation + 2 * math.pi * corner / corners
        points.append((shape.x * width + reach * math.cos(angle), shape.y * height + reach * math.sin(angle)))
    return points


def render(scene: Scene) -> Image.Image:
    """Draw ``scene`` as an RGB picture of its own size."""
    if scene.noise == "none":
        picture = Image.new("RGB", (scene.width, scene.height), scene.background)
    else:
        picture = _noisy_background(scene)
    pen = ImageDraw.Draw(picture)
    for shape in scene.shapes:
        if shape.kind == "circle":
            radius = shape.radius * min(scene.width, scene.height)
            x, y = shape.x * scene.width, shape.y * scene.height
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=shape.rgb)
        else:
            pen.polygon(outline(shape, scene.width, scene.height), fill=shape.rgb)
    return picture


def model_pixels(picture: Image.Image, side: int) -> npt.NDArray[np.uint8]:
    """``picture`` as the image processor resizes it: (side, side, 3) uint8, before rescaling and normalising."""
    resized = picture if picture.size == (side, side) else picture.resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(resized, np.uint8)
