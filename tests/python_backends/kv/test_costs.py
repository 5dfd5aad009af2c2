import pytest

from python_backends.kv.costs import Link, LinkSpeeds, Piece, choose

DISK: Link = ("nvme", "host")
MEMORY: Link = ("host", "device")


def speeds(disk, memory=1e9):
    return LinkSpeeds({DISK: disk, MEMORY: memory})


def test_a_link_that_was_slow_is_tried_again_after_a_while():
    now = [0.0]
    found = LinkSpeeds({DISK: 1e9}, clock=lambda: now[0])
    found.record(DISK, 2**20, 2**20 / 1e4)
    assert found.bytes_per_s(DISK) == pytest.approx(1e4)
    now[0] += 60
    assert found.bytes_per_s(DISK) == pytest.approx(2e4, rel=1e-3)
    now[0] += 1800
    assert found.bytes_per_s(DISK) == pytest.approx(1e9, rel=1e-3)


def plan(blocks, tail, tokens_per_s, found):
    return choose(blocks, tail, tokens=64 * len(blocks), block_tokens=64, tokens_per_s=tokens_per_s, speeds=found)


def test_a_fast_disk_loads_a_fast_device_recomputes_and_equals_meet_in_the_middle():
    blocks, tail = [Piece(1000, (DISK,))] * 100, Piece(0, (DISK,))
    assert plan(blocks, tail, 64, speeds(1e6)).way == "load"
    assert plan(blocks, tail, 64e4, speeds(1e3)).way == "recompute"
    both = plan(blocks, tail, 64, speeds(1000))  # a block a second either way
    assert (both.way, both.computed_blocks) == ("both", 50)
    assert both.seconds == pytest.approx(50)
    assert both.load_s == both.recompute_s == pytest.approx(100)


def test_the_meeting_point_is_the_best_of_all():
    blocks = [Piece(1000 + 37 * (index % 5), (DISK,) if index % 3 else (MEMORY,)) for index in range(60)]
    tail, found = Piece(40_000, (DISK,)), speeds(9000, 2000)
    chosen = plan(blocks, tail, 500, found)

    def seconds(computed):
        loads = {
            link: sum(piece.num_bytes for piece in (*blocks[computed:], tail) if link in piece.links)
            / found.bytes_per_s(link)
            for link in (DISK, MEMORY)
        }
        return max(computed * 64 / 500, *loads.values())

    assert chosen.way == "both"
    assert chosen.seconds == pytest.approx(min(seconds(computed) for computed in range(61)))


def test_a_tail_that_takes_longer_than_computing_everything_is_not_loaded():
    assert plan([Piece(10, (DISK,))] * 4, Piece(10**9, (DISK,)), 64, speeds(1e6)).way == "recompute"


def test_what_is_in_place_costs_nothing():
    assert plan([Piece(10**9, ())] * 4, Piece(10**9, ()), 1e6, speeds(1.0)).seconds == 0


def test_bandwidth_follows_what_was_measured_last():
    now = [0.0]
    found = LinkSpeeds(clock=lambda: now[0])
    before = found.bytes_per_s(DISK)
    assert found.bytes_per_s(MEMORY) > before
    for _ in range(100):
        found.record(DISK, 2**24, 2**24 / 3e9)
    assert found.bytes_per_s(DISK) == pytest.approx(3e9)
    for _ in range(100):
        found.record(DISK, 2**24, 2**24 / 1e8)
    assert found.bytes_per_s(DISK) == pytest.approx(1e8, rel=0.1)
    assert found.as_dict().keys() == {"nvme→host"}
