"""Figures made of times that are known."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.bench.figures import decode_speed, gaps, intrusion, kv_bytes, latencies, overlap, step_stats
from client.bench.load import Intrusion, Trace
from client.bench.side_by_side import cost
from python_backends.errors import ServerUnavailableError
from python_backends.manifest import Manifest, ModelShape


def trace(arrival: float, *stamps: float, error: str = "") -> Trace:
    return Trace(arrival, list(stamps), stamps[-1] if stamps else arrival, error)


def test_tokens_that_came_together_share_the_gap() -> None:
    assert gaps(trace(0, 1, 2, 4, 4, 5)) == [(2, 1), (4, 1), (4, 1), (5, 1)]
    assert gaps(trace(0, 1)) == []


@settings(deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=30).map(sorted))
def test_gaps_add_up_to_the_time_between_first_and_last(stamps: list[float]) -> None:
    later = [stamp for stamp in stamps if stamp > stamps[0]]
    found = gaps(trace(0, stamps[0], *later))
    assert len(found) == len(later)
    assert sum(gap for _, gap in found) == pytest.approx(max(stamps) - stamps[0])


def test_latencies_of_a_loop() -> None:
    found = latencies([trace(0, 1, 2, 3), trace(1, 3, 4, 5), trace(0, error="refused")])
    assert (found.requests, found.failed, found.output_tokens) == (2, 1, 6)
    assert found.output_tokens_per_s == pytest.approx(6 / 5)
    assert found.requests_per_s == pytest.approx(2 / 5)
    assert found.ttft_p50_ms == pytest.approx(1500)
    assert found.inter_token_p50_ms == pytest.approx(1000)


def test_a_loop_without_an_answer_says_why() -> None:
    with pytest.raises(ServerUnavailableError, match="refused"):
        latencies([trace(0, error="refused")])


def test_decode_speed_counts_only_while_the_whole_batch_decodes() -> None:
    early = trace(0, 1, 2, 3, 4, 5)
    late = trace(0, 3, 4, 5, 9)
    found = decode_speed([early, late], prompt_tokens=10)
    assert found.batch == 2
    assert found.tokens_per_s == pytest.approx(4 / 2)  # at 4 and 5, two tokens each
    assert found.step_ms == pytest.approx(1000)
    assert found.context == pytest.approx(10 + (3 + 4 + 1 + 2) / 4)


def test_answers_that_do_not_overlap_give_no_decode_speed() -> None:
    apart = [trace(0, 1, 2), trace(0, 3, 4)]
    assert not overlap(apart)
    with pytest.raises(ServerUnavailableError, match="overlap"):
        decode_speed(apart, 1)


def test_a_failed_request_gives_no_decode_speed() -> None:
    failed = [trace(0, 1, 2), trace(0, 1, error="lost")]
    assert overlap(failed)
    with pytest.raises(ServerUnavailableError, match="lost"):
        decode_speed(failed, 1)


def test_a_gap_that_touches_the_long_prompt_counts_as_during() -> None:
    found = intrusion(Intrusion([trace(0, 1, 2, 4, 8, 9, 10)], trace(3, 7, 8)))
    assert {name: part["inter_token_max_ms"] for name, part in found.items()} == {
        "before": 1000,
        "during": 4000,  # 2 → 4 and 4 → 8
        "after": 1000,
    }
    assert sum(part["tokens"] for part in found.values()) == 5


def test_local_layers_read_no_more_than_their_window() -> None:
    model = ModelShape(
        vocab_size=10,
        hidden_size=8,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        sliding_window=100,
        layer_types=("local", "local", "global"),
        max_context_length=1000,
        eos_token_ids=(1,),
        bos_token_id=2,
        pad_token_id=0,
        image=None,
    )
    fields = {"format": 1, "build_id": "", "fingerprint": "", "source": "", "name": "", "block_size": 32}
    rest = {"symmetric": True, "runtime": "", "ranks": 1, "versions": {}, "model": model, "stages": {}}
    row = 2 * 2 * 16
    assert kv_bytes(Manifest(precision="int4", **fields, **rest), 50) == 3 * 50 * row * 2
    assert kv_bytes(Manifest(precision="fp32", **fields, **rest), 500) == (100 + 100 + 500) * row * 4


def test_occupancy_counts_what_happened_between_two_readings() -> None:
    names = ("prefill_steps", "prefill_tokens", "prefill_seconds", "decode_steps", "decode_rows", "decode_seconds")
    zero = dict.fromkeys((*names, "computed_tokens", "drafted_tokens", "accepted_tokens", "padding_share"), 1.0)
    after = {**zero, "prefill_tokens": 11.0, "prefill_seconds": 3.0, "decode_steps": 5.0, "decode_rows": 31.0}
    after |= {"drafted_tokens": 4.0, "accepted_tokens": 1.0}
    found = step_stats(zero, {**after, "decode_seconds": 9.0, "computed_tokens": 51.0, "padding_share": 0.5})
    assert found["occupancy"] == pytest.approx(40 / 50)
    assert found["padding"] == pytest.approx(7 / 50)  # three drafts were refused
    assert found["decode_rows_per_step"] == pytest.approx(30 / 4)
    assert found["decode_step_ms"] == pytest.approx(2000)
    assert found["prefill_tokens_per_s"] == pytest.approx(5)


def test_what_triton_costs_is_the_median_over_pairs() -> None:
    alone = [decode_speed([trace(0, 1, 2, 3)], 1) for _ in range(3)]
    through = [decode_speed([trace(0, 1, 1 + step, 1 + 2 * step)], 1, cpu_s=0.3) for step in (1.1, 1.2, 3.0)]
    found = cost(1, alone, through, cores=2)
    assert found["added_ms"] == pytest.approx(200)
    assert found["share_of_step"] == pytest.approx(0.2)
    assert found["share_of_step_highest"] == pytest.approx(2.0)
    assert found["client_cpu_us_per_token"] == pytest.approx(100_000)
    assert found["share_without_client"] == pytest.approx(0.15)
