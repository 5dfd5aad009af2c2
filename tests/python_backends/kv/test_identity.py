"""Identity: equal where everything is equal, different where anything is not."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from python_backends.kv.identity import ImageSpan, PromptIds, content_hash, root_id, salt_hash

BLOCK = 4
ROOT = root_id(fingerprint=b"model", dtype="float32", layout_version=1, block_tokens=BLOCK, cache_salt="")
FIRST, SECOND = content_hash(b"first"), content_hash(b"second")
TOKENS = st.lists(st.integers(0, 262_143), min_size=1, max_size=40)


def ids(tokens: list[int], images: list[ImageSpan] | None = None) -> PromptIds:
    return PromptIds(tokens, images=images or [], root=ROOT, block_tokens=BLOCK, salt=salt_hash(""))


@given(TOKENS, st.data())
def test_what_is_appended_later_gives_the_same_ids(tokens: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(tokens)))
    whole, grown = ids(tokens), ids(tokens[:cut])
    before = [grown.block_id(index) for index in range(grown.num_blocks)]
    grown.extend(np.array(tokens[cut:], dtype=np.int32))
    assert len(grown) == len(tokens)
    assert before == [whole.block_id(index) for index in range(len(before))]
    assert whole.block_id(whole.num_blocks - 1) == grown.block_id(grown.num_blocks - 1)
    assert whole.tail_id(len(tokens)) == grown.tail_id(len(tokens))


@given(TOKENS, st.data())
def test_a_changed_token_changes_every_id_from_its_block_on_and_none_before(
    tokens: list[int], data: st.DataObject
) -> None:
    place = data.draw(st.integers(0, len(tokens) - 1))
    changed = list(tokens)
    changed[place] ^= 1
    one, other = ids(tokens), ids(changed)
    for index in range(one.num_blocks):
        assert (one.block_id(index) == other.block_id(index)) == (index < place // BLOCK)
    for length in range(1, len(tokens) + 1):
        assert (one.tail_id(length) == other.tail_id(length)) == (length <= place)


def test_every_part_of_the_root_counts() -> None:
    same = {"fingerprint": b"model", "dtype": "float32", "layout_version": 1, "block_tokens": 4, "cache_salt": ""}
    others = [{"fingerprint": b"mode"}, {"dtype": "float16"}, {"layout_version": 2}, {"block_tokens": 8},
              {"cache_salt": "a"}, {"fingerprint": b"modelfloat32", "dtype": ""}]  # fmt: skip
    roots = {root_id(**{**same, **other}) for other in others}  # type: ignore[arg-type]
    assert len(roots | {ROOT}) == len(others) + 1
    assert root_id(**same) == ROOT  # type: ignore[arg-type]


def test_an_image_changes_the_blocks_it_overlaps_whichever_part_of_it_they_hold() -> None:
    tokens = [7] * 16
    plain, one, other = (ids(tokens, images) for images in ([], [ImageSpan(6, 10, FIRST)], [ImageSpan(6, 10, SECOND)]))
    assert plain.block_id(0) == one.block_id(0) == other.block_id(0)
    assert len({prompt.block_id(1) for prompt in (plain, one, other)}) == 3
    # Only the offset tells these apart: the same placeholder ids, the same image.
    moved = ids(tokens, [ImageSpan(5, 9, FIRST)])
    assert moved.block_id(1) != one.block_id(1)


def test_the_whole_image_counts_where_only_its_beginning_lies_in_the_block() -> None:
    short, long = (ids([7] * 12, [ImageSpan(2, end, FIRST)]) for end in (6, 8))
    assert short.block_id(0) != long.block_id(0)


def test_no_tail_ends_within_an_image() -> None:
    prompt = ids([7] * 12, [ImageSpan(3, 9, FIRST)])
    assert [prompt.can_resume_at(length) for length in range(14)] == (
        [False] + [True] * 3 + [False] * 5 + [True] * 4 + [False]
    )
    with pytest.raises(ValueError, match="no tail"):
        prompt.tail_id(5)
    assert prompt.tail_id(3) == ids([7] * 3).tail_id(3)


def test_blocks_and_tails_never_share_an_id_and_keys_tell_their_place() -> None:
    prompt = ids(list(range(12)))
    found = [prompt.block_id(index) for index in range(3)] + [prompt.tail_id(length) for length in range(1, 13)]
    assert len({ROOT, *found}) == len(found) + 1
    block, tail = prompt.block_key(1, 100), prompt.tail_key(10, 7)
    assert (block.parent, block.position, block.num_bytes, block.kind) == (prompt.block_id(0), 8, 100, "block")
    assert (tail.parent, tail.position, tail.num_bytes, tail.kind) == (prompt.block_id(1), 10, 7, "tail")


@pytest.mark.parametrize(
    "images",
    [[ImageSpan(2, 2, FIRST)], [ImageSpan(0, 4, FIRST), ImageSpan(3, 6, FIRST)], [ImageSpan(0, 4, b"short")]],
)
def test_images_that_cannot_be_are_refused(images: list[ImageSpan]) -> None:
    with pytest.raises(ValueError, match="image"):
        ids([1] * 8, images)


def test_order_of_images_counts() -> None:
    prompts = [
        ids([7] * 8, [ImageSpan(0, 2, a), ImageSpan(2, 4, b)]) for a, b in itertools.product((FIRST, SECOND), repeat=2)
    ]
    assert len({prompt.block_id(0) for prompt in prompts}) == 4
