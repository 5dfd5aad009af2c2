"""Every key of the configuration has an effect, and a test marked ``effect`` with its name shows it."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from python_backends.config import Config
from tests.paths import ROOT

KEYS = sorted(field.name for field in dataclasses.fields(Config))


def effects() -> Iterator[tuple[str, Path, ast.FunctionDef]]:
    """Each key that a marker names, and the test that it marks; read, not imported, so that all of them are seen."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            for marker in node.decorator_list:
                if isinstance(marker, ast.Call) and ast.unparse(marker.func) == "pytest.mark.effect":
                    for argument in marker.args:
                        yield ast.literal_eval(argument), path, node


FOUND = list(effects())


@pytest.mark.parametrize("key", KEYS)
def test_a_key_has_a_test_that_shows_its_effect(key: str) -> None:
    assert [node.name for name, _, node in FOUND if name == key], f"no test is marked @pytest.mark.effect({key!r})"


def test_markers_name_keys_that_there_are() -> None:
    assert {name for name, _, _ in FOUND} <= set(KEYS)


def test_a_marked_test_sets_the_key_itself() -> None:
    """To something: in its body or its parameters, by name."""
    without = []
    for key, path, node in FOUND:
        rest = [each for each in node.decorator_list if ast.unparse(each).startswith("pytest.mark.parametrize")]
        names = {each.arg for part in (*node.body, *rest) for each in ast.walk(part) if isinstance(each, ast.keyword)}
        texts = [
            each.value for part in (*node.body, *rest) for each in ast.walk(part) if isinstance(each, ast.Constant)
        ]
        said = any(isinstance(text, str) and (key in text or key.upper() in text) for text in texts)
        if key not in names and not said:
            without.append(f"{path.name}: {node.name} never sets {key}")
    assert without == []
