"""Text comes out whole: characters never halved, stop strings never shown in part."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from python_backends.decoder.detokenizer import Detokenizer, StopStrings

BYTES = {f"<0x{value:02X}>": value for value in range(256)}


@pytest.fixture(scope="module")
def tokenizer():
    """Gemma's kind of tokenizer, bytes only but for a few words."""
    vocab = dict(BYTES) | {"▁": 256, "a": 257, "▁a": 258, "中": 259}
    built = Tokenizer(models.BPE(vocab, [("▁", "a")], byte_fallback=True, fuse_unk=True))
    built.normalizer = normalizers.Replace(" ", "▁")
    built.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return built


@given(text=st.text())
def test_pieces_add_up_to_the_text_and_hold_whole_characters(tokenizer, text):
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer.encode(text).ids
    pieces = [detokenizer.add(token) for token in ids]
    assert "".join(pieces) + detokenizer.finish() == tokenizer.decode(ids) == text


@given(ids=st.lists(st.integers(0, 259), max_size=30))
def test_any_ids_come_out_without_error_and_valid_text_is_never_lost(tokenizer, ids):
    detokenizer = Detokenizer(tokenizer)
    streamed = "".join(detokenizer.add(token) for token in ids) + detokenizer.finish()
    whole = tokenizer.decode(ids)
    assert streamed.replace("\ufffd", "").count("中") >= ids.count(259)
    assert ("\ufffd" in streamed) == ("\ufffd" in whole)
    if "\ufffd" not in whole:
        assert streamed == whole


def test_an_emoji_in_four_tokens_comes_with_the_last(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.add(value) for value in "😀".encode()] == ["", "", "", "😀"]


TEXTS = {
    "Devanagari": "नमस्ते दुनिया, क्षत्रिय श्री",
    "Chinese": "你好,世界。龘",
    "emoji": "👩‍👩‍👧‍👦 🇮🇳 👍🏽",
    "accents": "e\u0301 ñ ﷺ",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("known", [False, True], ids=["bytes", "tokens and bytes"])
def test_scripts_come_out_whole_character_by_character(text, known):
    """As bytes alone, and where every other character has a token of its own between the others' bytes."""
    pieces = {"▁": 256} | (
        {char: 257 + number for number, char in enumerate(sorted({*text} - {" "})[::2])} if known else {}
    )
    built = Tokenizer(models.BPE(dict(BYTES) | pieces, [], byte_fallback=True, fuse_unk=True))
    built.normalizer = normalizers.Replace(" ", "▁")
    built.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    ids = built.encode(text).ids
    detokenizer, shown = Detokenizer(built), ""
    for count, token in enumerate(ids, 1):
        shown += detokenizer.add(token)
        complete = b"".join(
            bytes([int(piece[3:5], 16)]) if piece.startswith("<0x") else piece.replace("▁", " ").encode()
            for piece in map(built.id_to_token, ids[:count])
        ).decode(errors="ignore")
        assert shown == complete, "every character comes with its last byte"
    assert shown + detokenizer.finish() == text


def test_an_unfinished_character_is_shown_as_replacement_at_the_end(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.add(0xE4) == ""
    assert "\ufffd" in detokenizer.finish()


@given(
    text=st.text("abc", max_size=40),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    data=st.data(),
)
def test_stop_strings_cut_at_the_first_match_however_the_text_is_split(text, stops, data):
    matcher = StopStrings(stops)
    given_out, position, stopped = "", 0, False
    while position < len(text) and not stopped:
        size = data.draw(st.integers(1, len(text) - position))
        safe, stopped = matcher.add(text[position : position + size])
        given_out += safe
        position += size
        assert not any(stop in given_out for stop in stops)
    if not stopped:
        given_out += matcher.finish()
    found = [text.find(stop) for stop in stops if stop in text[:position]]
    assert stopped == bool(found)
    if not stopped:
        assert given_out == text
    else:
        assert text.startswith(given_out)
        assert any(text[len(given_out) :].startswith(stop) for stop in stops)
