"""docs/configuration.md has every key with its default and its description, as the code has them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re

import pytest
from typer.testing import CliRunner

from client.commands.app import app
from python_backends import config
from tests.paths import ROOT

PAGE = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
FIELDS = {field.name: field for field in dataclasses.fields(config.Config)}


def descriptions() -> dict[str, str]:
    """The text under each key."""
    (made,) = ast.parse(inspect.getsource(config.Config)).body
    assert isinstance(made, ast.ClassDef)
    found = {}
    for field, text in zip(made.body, made.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            found[ast.unparse(field.target)] = " ".join(inspect.cleandoc(ast.literal_eval(text.value)).split())
    return found


def row(name: str) -> str:
    """A key's line of the page."""
    text = re.sub(r"``(.+?)``", r"`\1`", descriptions()[name]).replace("|", "\\|")
    return f"| `{name}` | `{json.dumps(FIELDS[name].default)}` | {text} |"


@pytest.mark.parametrize("name", FIELDS)
def test_a_key_is_described(name: str) -> None:
    assert row(name) in PAGE.splitlines(), f"docs/configuration.md lacks the line\n{row(name)}"


def test_nothing_else_is_described() -> None:
    assert sorted(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) == sorted(FIELDS)


def test_contradictions_are_told() -> None:
    for names, _, _ in config.CONTRARY:
        assert " and ".join(f"`{name}`" for name in names) in PAGE


@pytest.mark.parametrize("command", ["serve", "up"])
def test_help_points_to_the_page(command: str) -> None:
    assert "docs/configuration.md" in CliRunner().invoke(app, [command, "--help"]).output
