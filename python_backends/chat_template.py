"""The checkpoint's own chat template, rendered as transformers renders it.

With Jinja alone: importing transformers costs half a second and 60 MB here, and pulls `ssl` in, which a Triton stub
that found another libpython than its standard library's cannot load.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from python_backends.errors import ArtifactError, InvalidMessagesError


class ChatTemplate:
    """One template and the special tokens it may name (``bos_token``, …).

    Raises:
        ArtifactError: not a Jinja template.
    """

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        try:
            self._template = _compile(source)
        except TemplateError as error:
            raise ArtifactError(f"the checkpoint's chat template is not valid: {error}") from error
        self._special_tokens = special_tokens

    def render(self, messages: list[dict[str, Any]]) -> str:
        """The prompt's text, up to the turn that the model is to write.

        Raises:
            InvalidMessagesError: a conversation that the template refuses, such as roles that do not alternate.
        """
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._special_tokens
            )
        except TemplateError as error:
            raise InvalidMessagesError(str(error)) from error


def load_template(folder: Path, special_tokens: dict[str, str]) -> ChatTemplate | None:
    """The template among a checkpoint's tokenizer files; None for a base model that has none.

    Looks where transformers looks, newest form first: ``chat_template.jinja``, ``chat_template.json`` (a processor's),
    the key ``chat_template`` of ``tokenizer_config.json``.

    Raises:
        ArtifactError: a template that cannot be read.
    """
    path = folder / "chat_template.jinja"
    if path.exists():
        return ChatTemplate(path.read_text(encoding="utf-8"), special_tokens)
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = folder / name
        if not path.exists():
            continue
        try:
            source = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
            if isinstance(source, list):  # several, by name
                source = {entry["name"]: entry["template"] for entry in source}["default"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{path} holds no readable chat template: {error!r}") from error
        if isinstance(source, str):
            return ChatTemplate(source, special_tokens)
    return None


class _Generation(Extension):
    """The block ``{% generation %}`` that marks the assistant's text for training: shown as it is."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements inside the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(source: str) -> Template:
    """As `transformers.utils.chat_template_utils` compiles it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
