"""Random operation of the manager, with a caller that carries moves out late, in part and unsuccessfully."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from python_backends.errors import InternalError
from python_backends.kv.blocks import TIERS, EntryId, EntryKey, Move, Tier, TierLimits
from python_backends.kv.identity import PromptIds, root_id, salt_hash
from python_backends.kv.manager import KvManager
from python_backends.kv.policies import make_policies, makers
from python_backends.kv.policies.base import BlockStats

BLOCK = 4
SALTS = ("", "other")
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=22)


def prompt(tokens: list[int], salt: str) -> PromptIds:
    root = root_id(fingerprint=b"m", dtype="float32", layout_version=1, block_tokens=BLOCK, cache_salt=salt)
    return PromptIds(tokens, root=root, block_tokens=BLOCK, salt=salt_hash(salt))


class Everything:
    """Admits all but what lies at odd blocks of the other salt, so that both answers occur."""

    def admits(self, entry: BlockStats, now: float) -> bool:
        return entry.key.salt == salt_hash("") or bool(entry.key.position // BLOCK % 2)


class ManagerStates(RuleBasedStateMachine):
    policy = "a2cr"
    tiers: tuple[Tier, ...] = TIERS

    def __init__(self) -> None:
        super().__init__()
        limits = {"device": 24, "host": 30, "nvme": 60}
        self.limits = {tier: TierLimits(limits[tier], 0.8, 0.6) for tier in self.tiers}
        self.manager = KvManager(self.limits, make_policies(self.policy, self.limits), Everything(), block_tokens=BLOCK)
        self.payloads: dict[Tier, dict[EntryId, EntryKey]] = {tier: {} for tier in self.tiers}
        self.held: list[tuple[EntryKey, ...]] = []
        self.pinned: list[tuple[EntryKey, ...]] = []
        self.flying: list[Move] = []
        self.gone: set[EntryId] = set()
        """Lost or erased while pinned or held, so their absence is no fault."""
        self.now = 0.0

    # -- what a caller does ----------------------------------------------------------------------------------------

    def finish(self, move: Move, ok: bool) -> None:
        if ok and move.target is not None:
            assert move.key.id in self.payloads[move.source], "what is moved can be read until the move ends"
            self.payloads[move.target][move.key.id] = move.key
        for key, tier in self.manager.finish(move, self.now, ok=ok, reason="" if ok else "io"):
            del self.payloads[tier][key.id]

    @rule(seconds=st.sampled_from((0.0, 0.5, 30.0, 4000.0, -10.0)))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(tokens=TOKENS, salt=st.sampled_from(SALTS), tail=st.booleans(), keep=st.booleans(), fails=st.booleans())
    def serve(self, tokens: list[int], salt: str, tail: bool, keep: bool, fails: bool) -> None:
        ids = prompt(tokens, salt)
        match = self.manager.match(ids, len(ids) - 1, self.now)
        assert match.length <= match.deepest_block_match + BLOCK - 1
        assert match.length < len(ids)
        assert (match.length > 0) == (match.tail is not None)
        assert [key.id for key in match.blocks] == [ids.block_id(i) for i in range(match.length // BLOCK)]
        if match.tail is not None:
            assert match.tail.id == ids.tail_id(match.length)
        for key, tier in zip(match.keys, (*match.block_tiers, match.tail_tier), strict=False):
            assert tier is not None
            assert key.id in self.payloads[tier]
            assert key.salt == salt_hash(salt)
        self.manager.acquire(match.keys)
        visit = self.manager.touch(match.keys, self.now, [2.0] * len(match.keys))
        held = list(match.keys)
        keys = [ids.block_key(index, 2) for index in range(len(match.blocks), ids.num_blocks)]
        keys += [ids.tail_key(len(ids), 3)] if tail else []
        for key in keys:
            insert = self.manager.insert(key, "device", self.now, visit=visit, recompute_s=0.1)
            for move in insert.evict:
                self.finish(move, ok=not fails)
            if not insert.accepted:
                break
            assert insert.known == (key.id in self.payloads["device"])
            self.payloads["device"][key.id] = key
            self.manager.acquire([key])
            held.append(key)
        if keep:
            self.held.append(tuple(held))
        else:
            self.manager.release(held)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0))
    def release(self, which: int) -> None:
        self.manager.release(self.held.pop(which % len(self.held)))

    @rule(limit=st.integers(1, 8))
    def rebalance(self, limit: int) -> None:
        moves = self.manager.plan_moves(self.now, limit)
        assert len(moves) <= limit
        self.start(moves)

    @rule(tokens=TOKENS, up=st.sampled_from(("device", "host")))
    def prefetch(self, tokens: list[int], up: Tier) -> None:
        if up not in self.tiers:
            return
        match = self.manager.match(prompt(tokens, ""), len(tokens), self.now)
        self.start(self.manager.plan_prefetch(match.keys, up, self.now))

    def start(self, moves: list[Move]) -> None:
        for move in moves:
            if self.manager.begin(move, self.now):
                if move.target is None:
                    self.finish(move, ok=True)
                else:
                    self.flying.append(move)

    @precondition(lambda self: self.flying)
    @rule(which=st.integers(0), ok=st.booleans())
    def arrive(self, which: int, ok: bool) -> None:
        move = self.flying.pop(which % len(self.flying))
        self.finish(move, ok=ok and move.key.id in self.payloads[move.source])

    @rule(which=st.integers(0), tier=st.sampled_from(TIERS))
    def lose(self, which: int, tier: Tier) -> None:
        stored = list(self.payloads.get(tier, {}).values())
        if stored:
            key = stored[which % len(stored)]
            del self.payloads[tier][key.id]
            self.gone.add(key.id)
            self.manager.lost(key, tier, "checksum", self.now)

    @rule(which=st.integers(0))
    def erase(self, which: int) -> None:
        stored = [key for tier in self.tiers for key in self.payloads[tier].values()]
        if stored:
            self.gone |= {key.id for key in stored}
            for move in self.manager.erase([stored[which % len(stored)]], self.now):
                self.finish(move, ok=True)

    @rule(tokens=TOKENS)
    def pin(self, tokens: list[int]) -> None:
        keys = self.manager.match(prompt(tokens, ""), len(tokens), self.now).keys
        if sum(map(len, self.pinned)) + len(keys) <= 8:
            self.manager.pin(keys)
            self.pinned.append(keys)

    @precondition(lambda self: self.pinned)
    @rule(which=st.integers(0))
    def unpin(self, which: int) -> None:
        self.manager.unpin(self.pinned.pop(which % len(self.pinned)))

    @rule(quota=st.sampled_from((None, 6, 14)))
    def quota(self, quota: int | None) -> None:
        self.manager.set_quota(salt_hash("other"), quota)

    @rule()
    def restart(self) -> None:
        """The slowest tier's files are all that is left."""
        if self.flying or self.held or self.pinned:
            return
        last = self.tiers[-1]
        stored = self.payloads[last]
        self.manager = KvManager(self.limits, make_policies(self.policy, self.limits), block_tokens=BLOCK)
        assert not self.manager.recover(reversed(stored.values()), last, self.now)
        self.payloads = {tier: stored if tier == last else {} for tier in self.tiers}

    # -- what always holds -----------------------------------------------------------------------------------------

    @invariant()
    def books_and_payloads_agree(self) -> None:
        self.manager.check_integrity()
        tiers = self.manager.stats()["tiers"]
        assert isinstance(tiers, dict)
        flying = {tier: sum(m.key.num_bytes for m in self.flying if m.target == tier) for tier in self.tiers}
        for tier in self.tiers:
            stored = sum(key.num_bytes for key in self.payloads[tier].values())
            assert tiers[tier]["bytes"] == stored + flying[tier] <= self.limits[tier].limit_bytes

    @invariant()
    def nothing_that_is_held_or_pinned_goes(self) -> None:
        stored = {key for tier in self.tiers for key in self.payloads[tier]}
        for key in (key for keys in (*self.held, *self.pinned) for key in keys):
            assert key.id in stored | self.gone

    def teardown(self) -> None:
        for move in self.flying:
            self.finish(move, ok=False)
        for keys in self.held:
            self.manager.release(keys)
        for keys in self.pinned:
            self.manager.unpin(keys)
        every = [key for tier in self.tiers for key in self.payloads[tier].values()]
        for move in self.manager.erase(every, self.now):
            self.finish(move, ok=True)
        self.manager.check_integrity()
        assert not any(self.payloads.values())
        for keys in self.held:
            if keys:
                with pytest.raises(InternalError, match="more often"):
                    self.manager.release(keys)
        super().teardown()


def machine(policy: str, tiers: tuple[Tier, ...], examples: int, steps: int) -> type:
    made = type(f"States_{policy}_{len(tiers)}", (ManagerStates,), {"policy": policy, "tiers": tiers})
    case = made.TestCase
    case.settings = settings(max_examples=examples, stateful_step_count=steps, deadline=None)
    return case


@pytest.mark.parametrize("tiers", [TIERS, TIERS[:2], TIERS[:1], ("device", "nvme")], ids=len)
@pytest.mark.parametrize("policy", sorted(makers()))
def test_random_operations_keep_the_books_right(policy: str, tiers: tuple[Tier, ...]) -> None:
    machine(policy, tiers, 15, 30)("runTest").runTest()


@pytest.mark.soak
@pytest.mark.parametrize("policy", sorted(makers()))
def test_random_operations_keep_the_books_right_for_long(policy: str) -> None:
    machine(policy, TIERS, 1500, 80)("runTest").runTest()
