"""The demo world's pictures."""

import math
import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from builders.demo.drawing import (
    COLOURS,
    KINDS,
    MIN_SIZE,
    PLACE_MARGIN,
    Scene,
    Shape,
    outline,
    render,
    sample_scene,
)

seeds = st.integers(0, 2**32)
counts = st.integers(1, 4)


def corners(shape: Shape, scene: Scene) -> list[tuple[float, float]]:
    if shape.kind != "circle":
        return outline(shape, scene.width, scene.height)
    radius = shape.radius * min(scene.width, scene.height)
    centre = (shape.x * scene.width, shape.y * scene.height)
    angles = [step * math.pi / 8 for step in range(16)]
    return [(centre[0] + radius * math.cos(angle), centre[1] + radius * math.sin(angle)) for angle in angles]


@given(seeds, counts)
@settings(deadline=None, max_examples=40)
def test_the_same_seed_draws_the_same_pixels(seed: int, count: int) -> None:
    first, second = (sample_scene(random.Random(seed), count) for _ in range(2))
    assert first == second
    assert len(first.shapes) == count
    picture = render(first)
    assert picture.size == (first.width, first.height)
    assert picture.tobytes() == render(second).tobytes()


@given(seeds, counts)
@settings(deadline=None, max_examples=100)
def test_shapes_lie_inside_the_picture_and_clear_of_the_lines_between_places(seed: int, count: int) -> None:
    scene = sample_scene(random.Random(seed), count)
    for shape in scene.shapes:
        assert shape.size >= MIN_SIZE
        for x, y in corners(shape, scene):
            assert -0.01 <= x <= scene.width + 0.01
            assert -0.01 <= y <= scene.height + 0.01
        for value in (shape.x, shape.y):
            assert min(abs(value - 1 / 3), abs(value - 2 / 3)) >= PLACE_MARGIN


@given(seeds, st.integers(2, 4))
@settings(deadline=None, max_examples=60)
def test_shapes_do_not_overlap(seed: int, count: int) -> None:
    scene = sample_scene(random.Random(seed), count)
    short = min(scene.width, scene.height)
    for number, first in enumerate(scene.shapes):
        for second in scene.shapes[number + 1 :]:
            apart = math.hypot((first.x - second.x) * scene.width, (first.y - second.y) * scene.height)
            assert apart > (first.radius + second.radius) * short


@given(seeds, counts)
@settings(deadline=None, max_examples=40)
def test_every_shape_shows_its_colour_at_its_centre_and_stands_out(seed: int, count: int) -> None:
    scene = sample_scene(random.Random(seed), count)
    pixels = np.asarray(render(scene), np.int64)
    for shape in scene.shapes:
        at_centre = pixels[int(shape.y * scene.height), int(shape.x * scene.width)]
        assert tuple(at_centre) == shape.rgb
        assert math.dist(shape.rgb, scene.background) >= 120


def test_everything_the_world_promises_comes_up() -> None:
    rng = random.Random(5)
    scenes = [sample_scene(rng) for _ in range(600)]
    shapes = [shape for scene in scenes for shape in scene.shapes]
    assert {(shape.kind, shape.colour) for shape in shapes} == {(kind, colour) for kind in KINDS for colour in COLOURS}
    assert {shape.place for shape in shapes} == set(range(9))
    assert {len(scene.shapes) for scene in scenes} == {1, 2, 3, 4}
    assert {scene.noise for scene in scenes} == {"none", "fine", "grey", "blotches"}
