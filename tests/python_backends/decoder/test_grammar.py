"""Structured output: exact masks, valid answers, and matchers that branch and go back."""

import json
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import regex
from tokenizers import Tokenizer

from python_backends.decoder.grammar import Matcher
from python_backends.decoder.token_bytes import TokenBytes
from python_backends.decoder.tools import Tool, ToolChoice, call_grammar
from python_backends.errors import ArtifactError, InternalError
from tests.python_backends.decoder.gemma_style import CORPUS, EOS, SPECIAL, Setup, gemma_style, small_setup
from tests.python_backends.decoder.random_schemas import random_schema

DEMO = Path(__file__).parents[3] / "builders/demo/checkpoint/tokenizer.json"


@pytest.fixture(scope="module", params=["trained here", "demo checkpoint"])
def setup(request: pytest.FixtureRequest) -> Setup:
    if request.param == "trained here":
        return Setup(gemma_style(CORPUS, 320))
    if not DEMO.exists():
        pytest.skip("the demo checkpoint is not built")
    tokenizer = Tokenizer.from_file(str(DEMO))
    return Setup(tokenizer, [tokenizer.token_to_id("<eos>"), tokenizer.token_to_id("<end_of_turn>")])


@pytest.fixture(scope="module")
def small() -> Setup:
    return small_setup()


def _json_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"schema": schema}}


def test_every_completed_walk_on_200_random_schemas_parses_and_validates(setup: Setup) -> None:
    completed = 0
    for seed in range(200):
        schema, _ = random_schema(random.Random(seed))
        drawn = setup.walk(setup.grammar(_json_schema(schema)).matcher(), np.random.default_rng(seed))
        if drawn is not None:
            completed += 1
            jsonschema.Draft202012Validator(schema).validate(json.loads(setup.text(drawn)))
    assert completed >= 195


def test_every_way_to_tokenize_a_valid_instance_is_allowed(setup: Setup) -> None:
    for seed in range(200):
        schema, instance = random_schema(random.Random(seed))
        text = json.dumps(instance(), ensure_ascii=False, indent=None if seed % 3 else 2)
        one_by_one = [token for char in text for token in setup.encode(char)]
        for tokens in (setup.encode(text), one_by_one):
            matcher = setup.grammar(_json_schema(schema)).matcher()
            for token in tokens:
                assert token in setup.allowed(matcher), (schema, text)
                matcher.accept(token)
            assert matcher.is_complete


def test_json_object_walks_parse(setup: Setup) -> None:
    grammar = setup.grammar({"type": "json_object"})
    texts = [setup.walk(grammar.matcher(), np.random.default_rng(seed), patience=8) for seed in range(20)]
    parsed = [json.loads(setup.text(drawn)) for drawn in texts if drawn is not None]
    assert len(parsed) >= 15
    assert all(isinstance(value, dict) for value in parsed)


def test_a_demanded_call_is_valid_by_construction(setup: Setup) -> None:
    schema = {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"]}
    tools = [
        Tool("first", "", {**schema, "$defs": {"n": {"type": "integer", "minimum": 0, "maximum": 99}}}),
        Tool("second-one", "", {**schema, "$defs": {"n": {"enum": ["a", "b"]}}}),
    ]
    text = call_grammar(tools, ToolChoice("required"))
    assert text is not None
    names = set()
    for seed in range(30):
        drawn = setup.walk(setup.compiler.compile_lark(text).matcher(), np.random.default_rng(seed), patience=25)
        assert drawn is not None
        value = json.loads(setup.text(drawn))
        for call in value if isinstance(value, list) else [value]:
            tool = next(tool for tool in tools if tool.name == call["name"])
            jsonschema.Draft202012Validator(dict(tool.parameters)).validate(call["parameters"])
            names.add(call["name"])
    assert names == {"first", "second-one"}


def random_pattern(rng: random.Random, depth: int = 0) -> str:
    kind = rng.choice(
        ["text", "class", "text"] if depth > 2 else ["text", "class", "and", "or", "star", "count", "maybe"]
    )
    if kind == "text":
        return "".join(rng.choice("ab01") for _ in range(rng.randint(1, 3)))
    if kind == "class":
        return rng.choice(["[ab]", "[01]", "[a0]", r"\d", "[^a)]"])
    parts = [f"(?:{random_pattern(rng, depth + 1)})" for _ in range(2)]
    return {
        "and": parts[0] + parts[1],
        "or": f"{parts[0]}|{parts[1]}",
        "star": f"{parts[0]}*",
        "count": f"{parts[0]}{{1,3}}",
        "maybe": f"{parts[0]}?{parts[1]}",
    }[kind]


def check_by_brute_force(
    small: Setup, matcher: Matcher, prefixes: Callable[[bytes], bool], complete: Callable[[bytes], bool], seed: int
) -> int:
    """Follow one random walk and try every token at every step."""
    rng, so_far = random.Random(seed), b""
    for step in range(12):
        expected = {token for token, text in enumerate(small.bytes) if text and prefixes(so_far + text)}
        expected -= set(range(len(SPECIAL)))
        ends = complete(so_far)
        assert small.allowed(matcher) == expected | (small.eos if ends else set()), so_far
        assert matcher.is_complete == ends
        assert matcher.is_finished == (ends and not expected)
        if not expected:
            return step
        token = rng.choice(sorted(expected))
        matcher.accept(token)
        so_far += small.bytes[token]
    return 12


def test_a_regex_allows_exactly_the_tokens_that_can_be_completed(small: Setup) -> None:
    steps = 0
    for seed in range(60):
        pattern = random_pattern(random.Random(seed))
        compiled = regex.compile(pattern.replace(r"\d", "[0-9]"))

        def begins(text: bytes, compiled: Any = compiled) -> bool:
            # A token may stop within a character, which a class such as [^a] then completes.
            for tail in (
                b"",
                *(bytes([0x80] * count) for count in (1, 2, 3)),
                *(bytes([0xA0] * n) for n in (1, 2, 3)),
                b"\x90\x80\x80",
            ):
                try:
                    return compiled.fullmatch((text + tail).decode(), partial=True) is not None
                except UnicodeDecodeError:
                    continue
            return False

        def complete(text: bytes, compiled: Any = compiled) -> bool:
            try:
                return compiled.fullmatch(text.decode()) is not None
            except UnicodeDecodeError:
                return False

        matcher = small.grammar({"type": "regex", "regex": pattern}).matcher()
        steps += check_by_brute_force(small, matcher, begins, complete, seed)
    assert steps > 150


def test_a_choice_allows_exactly_the_tokens_that_can_be_completed(small: Setup) -> None:
    letters = random.Random(0)
    for seed in range(40):
        choices = ["".join(letters.choice('ab01 é日😀"\\\n') for _ in range(letters.randint(1, 6))) for _ in range(5)]
        texts = [choice.encode() for choice in choices]
        check_by_brute_force(
            small,
            small.grammar({"type": "choice", "choice": choices}).matcher(),
            lambda text, texts=texts: any(choice.startswith(text) for choice in texts),
            lambda text, texts=texts: text in texts,
            seed,
        )


LARK = """
start: sum
sum: term ("+" term)*
term: "a" | "b" | "(" sum ")"
"""
GBNF = """
root ::= term ("+" term)*
term ::= "a" | "b" | "(" root ")"
"""


def _sum_state(text: bytes) -> tuple[bool, bool]:
    """(whether a sum may begin like this, whether it is one)."""
    depth, wants_term = 0, True
    for char in text.decode("latin-1"):
        if wants_term and char in "ab(":
            depth, wants_term = depth + (char == "("), char == "("
        elif not wants_term and (char == "+" or (char == ")" and depth)):
            depth, wants_term = depth - (char == ")"), char == "+"
        else:
            return False, False
    return True, not wants_term and depth == 0


@pytest.mark.parametrize("grammar", [LARK, GBNF], ids=["lark", "gbnf"])
def test_a_grammar_allows_exactly_the_tokens_that_can_be_completed(small: Setup, grammar: str) -> None:
    compiled = small.grammar({"type": "grammar", "grammar": grammar})
    steps = [
        check_by_brute_force(
            small, compiled.matcher(), lambda text: _sum_state(text)[0], lambda text: _sum_state(text)[1], seed
        )
        for seed in range(15)
    ]
    assert max(steps) == 12


FORMATS: list[dict[str, Any]] = [
    {"type": "json_object"},
    {"type": "regex", "regex": r"[a-z ]{1,20}(ab|a)*\d?"},
    {"type": "choice", "choice": ["red", "read", "reader", "北京"]},
    {"type": "grammar", "grammar": LARK},
]


@pytest.mark.parametrize("response_format", FORMATS, ids=lambda value: value["type"])
def test_forks_and_rollbacks_equal_a_fresh_matcher(setup: Setup, response_format: dict[str, Any]) -> None:
    grammar = setup.grammar(response_format)
    for seed in range(12):
        rng = random.Random(seed)
        matcher, accepted = grammar.matcher(), list[int]()
        for _ in range(40):
            action = rng.choice(["accept"] * 4 + ["rollback", "fork"])
            if action == "rollback":
                count = rng.randint(0, min(4, len(accepted)))
                matcher.rollback(count)
                accepted = accepted[: len(accepted) - count]
            elif action == "fork":
                matcher, left = matcher.fork(), matcher
                if not left.has_ended:  # what happens to the other one changes nothing here
                    left.accept(min(setup.allowed(left)))
            elif not matcher.has_ended:
                token = rng.choice(sorted(setup.allowed(matcher)))
                matcher.accept(token)
                accepted.append(token)
            fresh = grammar.matcher()
            for token in accepted:
                fresh.accept(token)
            assert setup.allowed(matcher) == setup.allowed(fresh)
            assert (matcher.is_complete, matcher.is_finished) == (fresh.is_complete, fresh.is_finished)


def test_end_of_sequence_can_be_taken_back_and_then_the_answer_goes_on(small: Setup) -> None:
    matcher = small.grammar({"type": "choice", "choice": ["a", "ab"]}).matcher()
    with pytest.raises(InternalError, match="before the answer is complete"):
        matcher.accept(EOS[0])
    matcher.accept(small.encode("a")[0])
    before = small.allowed(matcher)
    for eos in EOS:
        matcher.accept(eos)
        assert matcher.is_finished
        assert small.allowed(matcher) == set(EOS)
        with pytest.raises(InternalError, match="after the end"):
            matcher.accept(eos)
        matcher.rollback(1)
        assert small.allowed(matcher) == before
    matcher.accept(EOS[1])
    matcher.rollback(2)
    assert small.encode("ab")[0] in small.allowed(matcher)
    with pytest.raises(ValueError, match="0 were accepted"):
        matcher.rollback(1)


def test_a_refused_token_leaves_the_matcher_as_it_was(small: Setup) -> None:
    matcher = small.grammar({"type": "choice", "choice": ["ab"]}).matcher()
    before = small.allowed(matcher)
    for wrong in (small.encode("(")[0], SPECIAL.index("<start_of_turn>"), small.vocab_size - 1):
        with pytest.raises(InternalError, match="does not fit"):
            matcher.accept(wrong)
    assert small.allowed(matcher) == before


def test_forced_bytes_are_what_every_answer_continues_with(small: Setup) -> None:
    matcher = small.grammar({"type": "choice", "choice": ["a(01", "a(0)"]}).matcher()
    assert matcher.forced_bytes() == b"a(0"
    for token in small.encode("a(0)"):
        matcher.accept(token)
    assert matcher.forced_bytes() == b""


def test_the_mask_goes_only_into_a_row_of_its_size(small: Setup) -> None:
    matcher = small.grammar({"type": "choice", "choice": ["a"]}).matcher()
    words = small.tokens.mask_words
    for wrong in (np.zeros(words, np.int64), np.zeros(words + 1, np.int32), np.zeros((words, 2), np.int32)[:, 0]):
        with pytest.raises(ValueError, match="contiguous int32"):
            matcher.mask(wrong)


def test_logits_narrower_than_the_vocabulary_are_refused(small: Setup) -> None:
    with pytest.raises(ArtifactError, match="build again"):
        TokenBytes(small.tokenizer, small.tokenizer.get_vocab_size() - 1, EOS)
    with pytest.raises(ArtifactError, match="end-of-sequence"):
        TokenBytes(small.tokenizer, small.vocab_size, [small.vocab_size])


def test_grammars_compile_on_many_threads_at_once(small: Setup) -> None:
    found: list[set[int]] = []

    def compile_one() -> None:
        found.append(small.allowed(small.grammar({"type": "regex", "regex": "[ab]+"}).matcher()))

    threads = [threading.Thread(target=compile_one) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [found[0]] * 16
