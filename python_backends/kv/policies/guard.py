"""Whether what was learned serves better than LRU would: an exact shadow of LRU, a few operations an entry.

LRU holds the newest visits' entries, as many as fit, and of the oldest of those visits the shallowest. So it suffices
to count, for each visit, the bytes of it that LRU would still hold: an entry that is used again was a hit of LRU's if
such bytes are left of its visit (entries are used in prompt order, and LRU evicts from the deep end).

Bytes found by the cache are compared with those that LRU would have found, one request after the other. Once LRU is
ahead, since the best moment, by more than `SIGMAS` standard deviations of what chance would do, the policy orders by
LRU; it tries again after as many requests as there were until then.
"""

from __future__ import annotations

from collections import deque

from python_backends.kv.policies.base import BlockStats, Visit

SIGMAS = 4.0


class Guard:
    """See the module.

    Args:
        capacity_bytes: of the cache.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity = capacity_bytes
        self._kept: deque[Visit] = deque()
        """Visits of which LRU holds something, or did until they were used again; oldest first."""
        self._bytes = 0
        self._lead = 0
        """Of the cache over LRU in the request that is being served, bytes."""
        self._behind = 0.0
        self._variance = 0.0
        self._requests = 0
        self._retry = 0
        self.trusted = True
        """False: order by LRU."""
        self.changes = 0

    def on_visit(self, visit: Visit) -> None:
        """A request comes; the one before is judged."""
        self._requests += 1
        lead, self._lead = self._lead, 0
        if self.trusted:
            self._judge(lead)
        elif self._requests >= self._retry:
            self._change(trusted=True)
        self._kept.append(visit)

    def _judge(self, lead: int) -> None:
        self._behind -= lead
        self._variance += lead * lead
        if self._behind <= 0:
            self._behind = self._variance = 0.0
        elif self._behind * self._behind > SIGMAS * SIGMAS * self._variance:
            self._retry = 2 * self._requests
            self._change(trusted=False)

    def _change(self, *, trusted: bool) -> None:
        self.trusted = trusted
        self._behind = self._variance = 0.0
        self.changes += 1

    def on_new(self, entry: BlockStats) -> None:
        """An entry comes that was not remembered."""
        self._grow(entry.visit, entry.key.num_bytes)

    def on_use(self, entry: BlockStats, visit: Visit, *, held: bool) -> None:
        """An entry of ``entry.visit`` is used by ``visit``."""
        size = entry.key.num_bytes
        before = entry.visit
        if before.lru_bytes >= size:
            before.lru_bytes -= size
            self._bytes -= size
            self._lead -= size
        if held:
            self._lead += size
        self._grow(visit, size)

    def _grow(self, visit: Visit, size: int) -> None:
        visit.lru_bytes += size
        self._bytes += size
        while self._bytes > self._capacity and self._kept:
            oldest = self._kept[0]
            gone = min(oldest.lru_bytes, self._bytes - self._capacity)
            oldest.lru_bytes -= gone
            self._bytes -= gone
            if oldest.lru_bytes == 0 and oldest is not visit:
                self._kept.popleft()
            elif gone == 0:
                return
