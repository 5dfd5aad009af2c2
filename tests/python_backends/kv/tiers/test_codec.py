"""Payloads in fewer bits: how far what comes back may be off, and that tiers keep their promises with them."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from python_backends.errors import ConfigError, EntryLostError, TierFullError
from python_backends.kv.tiers.arena import Arena
from python_backends.kv.tiers.codec import GROUP, GroupCodec, _narrowed, _rounded_down, _widened, make_codec
from python_backends.kv.tiers.coded import CodedArena
from tests.python_backends.kv.tiers.payloads import entry
from tests.python_backends.kv.tiers.stores import open_store

BLOCK = 4096


def round_trip(codec, values):
    payload = memoryview(values).cast("B")
    stored, back = memoryview(bytearray(codec.stored_bytes(len(payload)))), np.zeros_like(values)
    codec.encode(payload, stored)
    codec.decode(stored, memoryview(back).cast("B"))
    return back


@given(
    values=arrays.arrays(np.float32, st.integers(1, 200), elements=st.floats(-1000, 1000, width=32)),
    bits=st.sampled_from((4, 8)),
)
def test_no_element_is_off_by_more_than_its_group_allows(values, bits):
    back = round_trip(GroupCodec(bits, "float32"), values)
    for start in range(0, len(values), GROUP):
        part = values[start : start + GROUP]
        spread = max(part.max(), 0) - min(part.min(), 0) if len(part) < GROUP else part.max() - part.min()
        # Half a step, and what float16 leaves of the two ends.
        allowed = spread / (2**bits - 1) * 0.5 + 2**-10 * (abs(part).max() + spread) + 1e-4
        assert abs(back[start : start + GROUP] - part).max() <= allowed


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_sizes_and_errors_of_ordinary_values(dtype):
    values = np.random.default_rng(0).normal(0, 3, 32_000).astype(dtype)
    for bits, share, error in ((8, (1 + 4 / 32), 0.01), (4, (0.5 + 4 / 32), 0.12)):
        codec = GroupCodec(bits, dtype)
        assert codec.stored_bytes(values.nbytes) == 32_000 * share
        back = round_trip(codec, values).astype(np.float32)
        assert np.linalg.norm(back - values) / np.linalg.norm(values.astype(np.float32)) < error
    assert len({GroupCodec(8, dtype).name, GroupCodec(4, dtype).name}) == 2


def test_extremes_stay_finite():
    values = np.array([[np.finfo(np.float16).max, -np.finfo(np.float16).max] * 16, [0.0] * 32, [7.5] * 32], np.float32)
    for bits in (8, 4):
        back = round_trip(GroupCodec(bits, "float32"), values.reshape(-1)).reshape(3, 32)
        assert np.isfinite(back).all()
        assert (back[1] == 0).all()
        assert (back[2] == 7.5).all()


def test_float16_is_converted_as_numpy_does():
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)]
    wide = _widened(every)
    np.testing.assert_array_equal(wide, every.astype(np.float32))
    np.testing.assert_array_equal(_narrowed(wide.copy()), every)
    values = (np.random.default_rng(1).uniform(-6, 6, 10**5) * 10 ** np.linspace(-8, 4, 10**5)).astype(np.float32)
    found, wanted = _narrowed(values.copy()), values.astype(np.float16)
    assert (abs(found - values) <= abs(wanted - values) + 1e-11).all(), "as near, whichever of two"
    assert _narrowed(np.array([7e4, -7e4], np.float32)).tolist() == [65504, -65504]
    below = _rounded_down(values)
    assert (below <= values).all()
    assert (np.nextafter(below, np.float16(np.inf)).astype(np.float32) > values).all()


def test_as_is_is_no_codec_and_other_elements_cannot_be_rounded():
    assert make_codec("as-is", "int8") is None
    for dtype in ("int8", "uint16", "bfloat16"):
        with pytest.raises(ConfigError, match="as-is"):
            make_codec("int8", dtype)


def floats(key):
    return np.random.default_rng(key.id[0]).normal(size=key.num_bytes // 4).astype(np.float32)


@pytest.mark.parametrize("bits", [8, 4])
def test_an_arena_holds_more_of_them_and_gives_them_back_rounded(bits):
    codec = GroupCodec(bits, "float32")
    plain = Arena("host", 20 * BLOCK)
    coded = CodedArena(Arena("host", 20 * BLOCK, alignment=64), codec, BLOCK)
    assert coded.usable_bytes > plain.usable_bytes * (3 if bits == 8 else 6)
    keys = []
    with contextlib.suppress(TierFullError):
        for number in range(1000):
            coded.write(entry(number, BLOCK), memoryview(floats(entry(number, BLOCK))).cast("B"))
            keys.append(entry(number, BLOCK))
    assert len(keys) < 1000
    assert len(keys) * BLOCK >= coded.usable_bytes
    assert set(coded.entries()) == set(keys)
    for key in keys:
        with coded.view(key) as payload:
            np.testing.assert_array_equal(np.frombuffer(payload, np.float32), round_trip(codec, floats(key)))
    coded.drop(keys[0])
    assert not coded.contains(keys[0])
    with coded.fill(keys[0]) as room:
        room[:] = memoryview(floats(keys[0])).cast("B")
    into = memoryview(bytearray(BLOCK))
    coded.read(keys[0], into)
    np.testing.assert_array_equal(np.frombuffer(into, np.float32), round_trip(codec, floats(keys[0])))
    assert coded.stats().pressure > 0.9
    coded.erase(keys[1:])
    assert list(coded.entries()) == keys[:1]
    with pytest.raises(EntryLostError):
        coded.read(keys[1], into)
    coded.check_integrity()
    coded.close()


@pytest.mark.parametrize("bits", [8, 4])
def test_the_disk_verifies_what_it_stores_and_gives_it_back_rounded(tmp_path, bits):
    codec = GroupCodec(bits, "float32")
    store = open_store(tmp_path, codec=codec)
    keys = [entry(number, 8000) for number in range(20)]
    results = store.write_many([(key, memoryview(floats(key)).cast("B")) for key in keys])
    assert results == [None] * 20
    store.close()
    store = open_store(tmp_path, codec=codec)
    for key in keys:
        into = memoryview(bytearray(key.num_bytes))
        store.read(key, into)
        np.testing.assert_array_equal(np.frombuffer(into, np.float32), round_trip(codec, floats(key)))
    store.close()
    other = open_store(tmp_path)
    assert list(other.entries()) == []
    other.close()
