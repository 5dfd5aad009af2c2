"""A process that writes, drops and erases as fast as it can, saying after each call that it returned, until killed.

Lines on standard output: ``w|d|e <number>`` for entry ``number``; ``…?`` in front of a call that may not return.
"""

import random
import sys
from pathlib import Path

from python_backends.errors import TierFullError
from tests.python_backends.kv.tiers.payloads import payload
from tests.python_backends.kv.tiers.stores import numbered, open_store


def say(what: str) -> None:
    sys.stdout.write(what + "\n")
    sys.stdout.flush()


def main(folder: str, first: int, seed: int) -> None:
    draw = random.Random(seed)
    store = open_store(Path(folder))
    held = [int(n) for n in sys.stdin.readline().split()]
    number = first
    say("ready")
    while True:
        batch = list(range(number, number + draw.choice([1, 1, 4, 20])))
        number += len(batch)
        results = store.write_many([(numbered(n), memoryview(payload(numbered(n)))) for n in batch])
        done = [n for n, result in zip(batch, results, strict=True) if result is None]
        assert all(result is None or isinstance(result, TierFullError) for result in results)
        say("w " + " ".join(map(str, done)))
        held += done
        while sum(numbered(n).num_bytes for n in held) > 0.9 * store.usable_bytes:
            gone = [held.pop(draw.randrange(len(held))) for _ in range(min(len(held), 9))]
            if draw.random() < 0.2:
                say("e? " + " ".join(map(str, gone)))
                store.erase([numbered(n) for n in gone])
                say("e " + " ".join(map(str, gone)))
            else:
                say("d " + " ".join(map(str, gone)))
                for n in gone:
                    store.drop(numbered(n))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
