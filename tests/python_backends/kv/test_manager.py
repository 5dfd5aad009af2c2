"""What the manager decides, case by case; random operation is in test_manager_states."""

from __future__ import annotations

import pytest

from python_backends.errors import InternalError
from python_backends.kv.blocks import EntryKey, Match, TierLimits
from python_backends.kv.identity import PromptIds, root_id, salt_hash
from python_backends.kv.manager import KvManager
from python_backends.kv.policies import make_policies

BLOCK = 4


def prompt(length: int, salt: str = "", first: int = 0) -> PromptIds:
    root = root_id(fingerprint=b"m", dtype="float32", layout_version=1, block_tokens=BLOCK, cache_salt=salt)
    return PromptIds([first, *range(1, length)], root=root, block_tokens=BLOCK, salt=salt_hash(salt))


def manager(device: int = 100, host: int = 0, nvme: int = 0, *, tails: bool = True) -> KvManager:
    sizes = {"device": device, "host": host, "nvme": nvme}
    limits = {tier: TierLimits(size, 0.75, 0.5) for tier, size in sizes.items() if size}
    return KvManager(limits, make_policies("lru", limits), block_tokens=BLOCK, needs_tails=tails)  # type: ignore


def keep(kept: KvManager, ids: PromptIds, now: float, tails: tuple[int, ...] = ()) -> list[EntryKey]:
    match = kept.match(ids, len(ids), now)
    visit = kept.touch(match.keys, now)
    keys = [ids.block_key(index, 1) for index in range(ids.num_blocks)] + [ids.tail_key(at, 1) for at in tails]
    for key in keys:
        insert = kept.insert(key, "device", now, visit=visit)
        for move in insert.evict:
            kept.finish(move, now, ok=True)
        assert insert.accepted
    return keys


def found(kept: KvManager, ids: PromptIds, limit: int | None = None) -> Match:
    return kept.match(ids, len(ids) if limit is None else limit, 0.0)


def test_a_hit_ends_at_the_deepest_tail_that_is_held() -> None:
    kept, ids = manager(), prompt(18)
    keep(kept, ids, 1.0, tails=(3, 10, 18))
    for limit, length, blocks in ((18, 18, 4), (17, 10, 2), (10, 10, 2), (9, 3, 0), (2, 0, 0)):
        match = found(kept, ids, limit)
        assert (match.length, len(match.blocks)) == (length, blocks)
        assert match.missed == ("" if length == limit else "no_tail")
    assert found(kept, ids, 17).deepest_block_match == 16


def test_why_a_prompt_misses() -> None:
    kept, ids = manager(device=3), prompt(12)
    assert found(kept, ids).missed == "new"
    keys = keep(kept, ids, 1.0)
    kept.lost(keys[2], "device", "checksum", 2.0)
    assert found(kept, ids).missed == "no_tail"
    kept.lost(keys[0], "device", "checksum", 2.0)
    assert found(kept, ids).missed == "lost"
    keep(kept, prompt(12, first=9), 3.0)
    assert found(kept, ids).missed in ("lost", "evicted")
    kept.acquire([(held := prompt(12, first=9)).block_key(0, 1)])
    kept.erase([held.block_key(0, 1)], 4.0)
    assert found(kept, held).missed == "erased"


def test_salts_share_nothing() -> None:
    kept = manager()
    keep(kept, prompt(12), 1.0, tails=(12,))
    assert found(kept, prompt(12)).length == 12
    assert found(kept, prompt(12, "mine")).deepest_block_match == 0


def test_the_end_of_a_prompt_goes_before_its_beginning() -> None:
    kept = manager(device=6)
    keep(kept, prompt(16), 1.0)
    keep(kept, prompt(16, first=5), 2.0)
    assert found(kept, prompt(16)).deepest_block_match == 8
    assert found(kept, prompt(16, first=5)).deepest_block_match == 16
    kept.check_integrity()


def test_held_entries_stay_and_the_newcomer_is_refused() -> None:
    kept = manager(device=3)
    keys = keep(kept, prompt(12), 1.0)
    kept.acquire(keys)
    assert not kept.insert(prompt(4, first=5).block_key(0, 1), "device", 2.0).accepted
    kept.release(keys)
    assert kept.insert(prompt(4, first=5).block_key(0, 1), "device", 2.0).accepted
    with pytest.raises(InternalError, match="more often"):
        kept.release(keys[:1])


def test_a_tier_above_its_high_watermark_is_brought_down_to_the_low_one() -> None:
    kept = manager(device=8, host=20, tails=False)
    keep(kept, prompt(28), 1.0)
    moves = kept.plan_moves(2.0, 100)
    assert [move.key.position for move in moves] == [28, 24, 20], "from the end, down to 4 of 8"
    assert all((move.source, move.target) == ("device", "host") for move in moves)
    for move in moves:
        assert kept.begin(move, 2.0)
    kept.check_integrity()
    assert kept.finish(moves[0], 3.0, ok=True) == [(moves[0].key, "device")]
    match = found(kept, prompt(28))
    assert match.block_tiers == ("device",) * 6 + ("host",)
    assert match.deepest_block_match == 28, "what is on its way can still be read where it was"


def test_what_a_request_needs_meanwhile_is_copied_but_not_taken_away() -> None:
    kept = manager(device=4, host=20, tails=False)
    keys = keep(kept, prompt(16), 1.0)
    (move, *_) = kept.plan_moves(2.0, 1)
    assert kept.begin(move, 2.0)
    kept.acquire(keys)
    assert kept.finish(move, 3.0, ok=True) == []
    assert found(kept, prompt(16)).block_tiers == ("device",) * 4
    kept.check_integrity()


def test_a_failing_tier_is_left_alone_for_a_while_and_forgiven() -> None:
    kept = manager(device=4, nvme=100)
    keep(kept, prompt(16), 1.0)
    moves = kept.plan_moves(2.0, 100)
    assert kept.begin(moves[0], 2.0)
    assert kept.finish(moves[0], 2.0, ok=False, reason="io") == [(moves[0].key, "device")]
    keep(kept, prompt(16), 2.1)
    assert kept.plan_moves(2.5, 100) == []
    assert kept.plan_moves(3.5, 100) != []
    assert kept.stats()["failed"] == {"device>nvme/io": 1}


def test_pinned_entries_are_written_through_and_outlive_a_flood() -> None:
    kept = manager(device=6, nvme=50)
    keys = keep(kept, prompt(8), 1.0, tails=(8,))
    kept.pin(keys)
    saves = [move for move in kept.plan_moves(2.0, 100) if move.reason == "write_through"]
    assert [move.key for move in saves] == keys
    for move in saves:
        assert kept.begin(move, 2.0)
        assert kept.finish(move, 2.0, ok=True) == []
    for index in range(30):
        keep(kept, prompt(16, first=100 + index), 3.0 + index)
        for move in kept.plan_moves(3.0 + index, 100):
            if kept.begin(move, 3.0 + index):
                kept.finish(move, 3.0 + index, ok=True)
    match = found(kept, prompt(8))
    assert (match.length, match.tail_tier) == (8, "nvme")
    kept.check_integrity()


def test_prefetch_copies_up_in_prompt_order_and_only_what_fits() -> None:
    kept = manager(device=3, nvme=50, tails=False)
    ids = prompt(20)
    assert kept.recover([ids.block_key(index, 1) for index in (4, 2, 0, 1, 3)], "nvme", 0.0) == []
    assert found(kept, ids).block_tiers == ("nvme",) * 5
    moves = kept.plan_prefetch(found(kept, ids).keys, "device", 1.0)
    assert [move.key.position for move in moves] == [4, 8, 12]
    assert all(kept.begin(move, 1.0) and not kept.finish(move, 1.0, ok=True) for move in moves)
    assert found(kept, ids).block_tiers == ("device",) * 3 + ("nvme",) * 2
    kept.check_integrity()


def test_what_a_request_waits_for_takes_the_place_of_what_is_worth_least() -> None:
    kept = manager(device=8, nvme=50, tails=False)
    ids, pinned, other = prompt(20), prompt(8, first=1), prompt(24, first=2)
    kept.recover([ids.block_key(index, 1) for index in range(5)], "nvme", 0.0)
    kept.pin(keep(kept, pinned, 1.0))
    keep(kept, other, 2.0)
    moves = kept.plan_prefetch(found(kept, ids).keys, "device", 3.0)
    dropped = [move.key for move in moves if move.target is None]
    assert dropped == [other.block_key(index, 1) for index in (5, 4, 3, 2, 1)], "deepest first, and no more than needed"
    assert all(kept.begin(move, 3.0) for move in moves)
    for move in moves:
        kept.finish(move, 3.0, ok=True)
    assert found(kept, ids).block_tiers == ("device",) * 5
    assert (found(kept, pinned).length, found(kept, other).length) == (8, 4)
    kept.check_integrity()


def test_a_quota_makes_a_salt_evict_its_own() -> None:
    kept = manager(device=10)
    kept.set_quota(salt_hash("mine"), 2)
    keep(kept, prompt(12), 1.0)
    keep(kept, prompt(8, "mine"), 2.0)
    keep(kept, prompt(8, "mine", first=5), 3.0)
    assert found(kept, prompt(12)).deepest_block_match == 12
    assert found(kept, prompt(8, "mine")).deepest_block_match == 0
    assert found(kept, prompt(8, "mine", first=5)).deepest_block_match == 8


def test_a_lost_parent_makes_the_rest_useless_until_it_is_back() -> None:
    kept, ids = manager(device=8), prompt(12)
    keys = keep(kept, ids, 1.0)
    kept.lost(keys[0], "device", "io", 2.0)
    assert kept.stats()["orphans"] == 1
    assert not kept.insert(prompt(8, first=3).block_key(1, 1), "device", 2.0).accepted, "a child before its parent"
    kept.insert(keys[0], "device", 3.0)
    assert kept.stats()["orphans"] == 0
    assert found(kept, ids).deepest_block_match == 12
