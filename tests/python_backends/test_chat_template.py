"""Templates render as transformers renders them, whatever Jinja they use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from python_backends.chat_template import ChatTemplate, load_template
from python_backends.errors import ArtifactError, InvalidMessagesError

MESSAGES = [{"role": "user", "content": "a <b> & 'ü'"}, {"role": "assistant", "content": "c\n"}]
TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>"}

TEMPLATES = {
    "special tokens": "{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}{{ pad_token }}",
    "generation prompt": "{% if add_generation_prompt %}yes{% endif %}{% if tools is none %}no tools{% endif %}",
    "block trimming": "{% for m in messages %}\n  {% if true %}\n{{ m.role }}\n  {% endif %}\n{% endfor %}\nend\n",
    "loop controls": "{% for m in messages %}{% if loop.index0 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2, sort_keys=true) }}",
    "generation block": "{% for m in messages %}{% generation %}{{ m.content | trim }}{% endgeneration %};{% endfor %}",
    "year": "{{ strftime_now('%Y') }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "undefined": "{{ nothing }}{{ messages[0].nothing }}|",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_as_in_transformers(name: str) -> None:
    source = TEMPLATES[name]
    (expected,), _ = render_jinja_template([MESSAGES], chat_template=source, add_generation_prompt=True, **TOKENS)
    assert ChatTemplate(source, TOKENS).render(MESSAGES) == expected


@pytest.mark.parametrize(
    "source",
    ["{{ raise_exception('roles must alternate') }}", "{{ messages[7]['content'] }}", "{{ messages.append(1) }}"],
    ids=["refused", "undefined", "sandboxed"],
)
def test_what_a_template_refuses_is_an_invalid_conversation(source: str) -> None:
    with pytest.raises(InvalidMessagesError):
        ChatTemplate(source, {}).render(MESSAGES)


def test_a_broken_template_is_an_artifact_error() -> None:
    with pytest.raises(ArtifactError, match="chat template"):
        ChatTemplate("{% if %}", {})


def test_the_newest_form_of_the_file_wins(tmp_path: Path) -> None:
    assert load_template(tmp_path, {}) is None
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "by name"}]
    forms = [
        ("tokenizer_config.json", json.dumps({"chat_template": named}), "by name"),
        ("tokenizer_config.json", json.dumps({"chat_template": "in the tokenizer"}), "in the tokenizer"),
        ("chat_template.json", json.dumps({"chat_template": "of the processor"}), "of the processor"),
        ("chat_template.jinja", "a file of its own", "a file of its own"),
    ]
    for name, content, expected in forms:
        (tmp_path / name).write_text(content, encoding="utf-8")
        template = load_template(tmp_path, {})
        assert template is not None
        assert template.render([]) == expected


@pytest.mark.parametrize("content", ["{", "[]", '{"chat_template": [{"name": "default"}]}', '{"chat_template": [{}]}'])
def test_a_file_that_cannot_be_read_is_an_artifact_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ArtifactError, match="tokenizer_config"):
        load_template(tmp_path, {})
