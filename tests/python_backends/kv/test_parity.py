"""Parity: wherever a prompt is cut and wherever its beginning comes from, logits and tokens are bit for bit those of a
cold run that computed it in one piece."""

from __future__ import annotations

import numpy as np
import pytest

from tests.python_backends.kv.caches import demote, open_cache, references
from tests.python_backends.kv.kept import Kept


@pytest.fixture(scope="module")
def kept():
    return Kept()


@pytest.fixture(scope="module")
def whole(kept):
    """(logits [T + 2, V], tokens) of the cold run."""
    return kept.drive()


STRIDES = [pytest.param(11, id="strided"), pytest.param(1, id="all", marks=pytest.mark.soak)]


def assert_equal(found, whole):
    logits, tokens = found
    np.testing.assert_array_equal(logits, whole[0])
    assert tokens == whole[1]


@pytest.mark.parametrize("stride", STRIDES)
def test_a_cold_run_cut_at_every_boundary_ends_as_the_whole_one(kept, whole, stride):
    for at in kept.boundaries()[::stride]:
        kept.spoil()
        assert_equal(kept.drive(at), whole)


@pytest.mark.parametrize("stride", STRIDES)
def test_a_sequence_set_aside_at_every_boundary_and_resumed_ends_as_the_whole_run(kept, whole, stride):
    for at in kept.boundaries()[::stride]:
        first = kept.begin(at)
        state = kept.runtime.export_slot(0, at)
        kept.spoil()
        kept.runtime.import_slot(0, state)
        logits, tokens = kept.drive(done=at)
        assert_equal(([*first, *logits], tokens), whole)


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("source", ["device", "host", "nvme", "restart"])
def test_from_every_tier_at_every_boundary_a_request_ends_as_the_whole_run(kept, whole, source, stride, tmp_path):
    cache = open_cache(kept.runtime.kv_layout, tmp_path)
    for number, at in enumerate(kept.boundaries()[::stride]):
        salt = str(number)  # every boundary alone
        first = kept.begin(at)
        keys = kept.keep(cache, at, salt)
        if source != "device":
            demote(cache, keys[::-1], "device", "host")
        if source in ("nvme", "restart"):
            demote(cache, keys[::-1], "host", "nvme")
        if source == "restart":
            cache.close()
            cache = open_cache(kept.runtime.kv_layout, tmp_path)
        hit = cache.look_up(kept.ids(cache, salt), kept.length - 1)
        assert hit.length == at
        tier = "nvme" if source == "restart" else source
        assert hit.tokens_by_tier == {"device": 0, "host": 0, "nvme": 0} | {tier: at}
        assert (hit.missed == "") == (at == kept.length - 1)
        logits, tokens = kept.resumed(hit)
        assert_equal(([*first, *logits], tokens), whole)
        hit.release()
        assert not references(cache)
        cache.check_integrity()
        with cache.lock:
            for move in cache._manager.erase(keys, 0.0):
                cache._carrier.finish(move, None)
    cache.close()
