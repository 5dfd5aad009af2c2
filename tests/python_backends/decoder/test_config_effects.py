"""What the keys of the configuration do to the engine and to the runtime under it."""

from __future__ import annotations

import time

import psutil
import pytest
from onnxruntime import GraphOptimizationLevel

from builders.build import Options, build
from builders.quantize import Precision
from python_backends import manifest
from python_backends.config import Config
from python_backends.decoder.engine import Engine
from python_backends.decoder.open import open_engine, open_runtime
from python_backends.decoder.parameters import parameters_within
from python_backends.errors import ConfigError, InvalidParameterError, OverloadedError
from python_backends.runtime.kernels import cpu
from tests.checkpoints import tiny
from tests.driver import decoder
from tests.paths import DEMO_CHECKPOINT
from tests.python_backends.decoder.callers import Caller, alone, prompt, word_tokenizer


def engine_of(config, slots=1, context=2048):
    return Engine(decoder(tiny("1b"), num_slots=slots, context=context), word_tokenizer(), config)


def begun(caller):
    """Once it has a slot."""
    while not caller.pieces:
        time.sleep(0.001)
    return caller


def prefill_steps(config, length):
    """Of one prompt alone."""
    engine = engine_of(config)
    alone(engine, prompt(1, length), max_tokens=1)
    engine.close()
    return engine.stats.read()["prefill_steps"]


@pytest.mark.effect("prefill_chunk")
def test_a_prompt_is_computed_in_chunks():
    assert prefill_steps(Config(prefill_chunk=64), 256) == 4
    assert prefill_steps(Config(prefill_chunk=256), 256) == 1


@pytest.mark.effect("target_inter_token_ms")
def test_chunks_beside_decoding_are_cut_for_the_target():
    def chunks(milliseconds):
        engine = engine_of(Config(target_inter_token_ms=milliseconds, prefill_chunk=1024, quantum_tokens=0), slots=2)
        running = begun(Caller(prompt(1, 8), max_tokens=1500).to(engine))
        before = engine.stats.read()["prefill_steps"]
        alone(engine, prompt(2, 1500), max_tokens=1)
        found = engine.stats.read()["prefill_steps"] - before
        running.cancelled = True
        running.wait()
        engine.close()
        return found

    assert chunks(1) > 2 * chunks(10_000)


@pytest.mark.effect("max_draft")
def test_drafts_are_made_up_to_the_longest():
    def drafted(most):
        engine = engine_of(Config(max_draft=most))
        alone(engine, prompt(1, 10) * 8, max_tokens=60)
        engine.close()
        return engine.stats.read()["drafted_tokens"]

    assert drafted(0) == 0
    assert drafted(4) > 0


@pytest.mark.effect("quantum_tokens")
def test_who_has_drawn_its_quantum_is_set_aside_for_one_that_waits():
    def moves(quantum):
        engine = engine_of(Config(quantum_tokens=quantum, max_draft=0))
        callers = [Caller(prompt(seed, 10), max_tokens=40).to(engine) for seed in range(2)]
        for caller in callers:
            caller.wait()
        engine.close()
        return engine.stats.read()["moves"]

    assert moves(0) == 0
    assert moves(8) > 0


class Noted(Caller):
    """Puts itself on a list when it ends, in the engine's order."""

    def __init__(self, ended, *args, **parameters):
        super().__init__(*args, **parameters)
        self._ended = ended

    def receive(self, piece):
        if piece.finish_reason:
            self._ended.append(self)
        super().receive(piece)


@pytest.mark.effect("max_overtakes")
def test_so_many_later_requests_may_come_first():
    """One slot, a long request that waits, and shorter ones that came after it."""

    def before_the_long_one(overtakes):
        engine = engine_of(Config(max_overtakes=overtakes, quantum_tokens=0, max_draft=0))
        ended = []
        running = begun(Caller(prompt(1, 8), max_tokens=1500).to(engine))
        long = Noted(ended, prompt(2, 600), max_tokens=64).to(engine)
        shorts = [Noted(ended, prompt(3 + number, 8), max_tokens=2).to(engine) for number in range(3)]
        running.cancelled = True
        for caller in (long, *shorts):
            caller.wait()
        engine.close()
        return ended.index(long)

    assert before_the_long_one(1) == 1
    assert before_the_long_one(8) == 3


@pytest.mark.effect("max_queue")
def test_more_than_may_wait_are_refused():
    engine = engine_of(Config(max_queue=1))
    running = begun(Caller(prompt(1, 8), max_tokens=500).to(engine))
    waiting = Caller(prompt(2, 8)).to(engine)
    with pytest.raises(OverloadedError):
        engine.submit(Caller(prompt(3, 8)).request)
    with pytest.raises(InvalidParameterError, match="room for 2 answers"):
        engine.submit(Caller(prompt(4, 8), n=3).request)
    running.cancelled = True
    waiting.wait()
    engine.close()


@pytest.mark.effect("max_tokens", "queue_timeout_ms", "deadline_ms")
def test_what_a_request_leaves_out_is_the_configurations():
    config = Config(max_tokens=3, queue_timeout_ms=20, deadline_ms=50)
    found = parameters_within(config, max_tokens=None)
    assert (found.max_tokens, found.queue_timeout_ms, found.deadline_ms) == (3, 20, 50)
    assert parameters_within(config, max_tokens=7, deadline_ms=9).max_tokens == 7
    engine = engine_of(config)
    answered = Caller(prompt(1, 8), max_tokens=found.max_tokens).to(engine).wait()
    assert len(answered.tokens) == 3
    running = begun(Caller(prompt(2, 8), max_tokens=2000).to(engine))
    late = Caller(prompt(3, 8), queue_timeout_ms=found.queue_timeout_ms).to(engine)
    assert late.wait().last.error.code == "deadline_exceeded"
    running.cancelled = True
    running.wait()
    ended = Caller(prompt(4, 8), max_tokens=2000, deadline_ms=found.deadline_ms).to(engine)
    assert ended.wait().last.finish_reason == "deadline"
    engine.close()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The demo model with quantized weights."""
    folder = tmp_path_factory.mktemp("effects") / "model_repository"
    build(DEMO_CHECKPOINT, folder, Options(Precision("int8")))
    return manifest.load(folder)


@pytest.mark.effect("max_batch_size", "max_context_length", "cpu_memory_gb")
def test_sizes_are_upper_bounds_that_memory_clips(built):
    def spec(**keys):
        runtime = open_runtime(built, Config(enable_hmt=False, **keys))
        runtime.close()
        return runtime.spec.num_slots, runtime.spec.max_context_length

    assert spec(max_batch_size=3, max_context_length=512) == (3, 512)
    slots, context = spec(max_batch_size=16, max_context_length=8192, cpu_memory_gb=0.05)
    assert slots * context < 16 * 8192
    with pytest.raises(ConfigError, match="cpu_memory_gb"):
        spec(cpu_memory_gb=1e-5)


@pytest.mark.effect("enable_hmt", "kv_cache_share", "kv_block_tokens")
def test_kept_kv_takes_its_share_of_the_memory_in_blocks(built):
    def cache_of(**keys):
        engine = open_engine(built, Config(cpu_memory_gb=0.5, max_context_length=512, **keys))
        found = None if engine.cache is None else (engine.cache.layout.block_tokens, engine.snapshot()["kv_cache"])
        engine.close()
        return found

    def kept(cache):
        return sum(tier["limit_bytes"] for tier in cache[1]["tiers"].values())

    assert cache_of(enable_hmt=False) is None
    small, large = cache_of(kv_cache_share=0.25, kv_block_tokens=32), cache_of(kv_cache_share=0.75)
    assert (small[0], large[0]) == (32, Config().kv_block_tokens)
    assert kept(large) == pytest.approx(3 * kept(small), rel=0.05)
    assert kept(small) <= 0.5e9 * 0.25


@pytest.mark.effect("num_threads")
def test_the_runtime_has_so_many_threads(built):
    def settled():
        """Threads of this process, once those of earlier tests have ended."""
        found, last = psutil.Process().num_threads(), 0
        while found != last:
            time.sleep(0.2)
            found, last = psutil.Process().num_threads(), found
        return found

    def threads(number):
        before = settled()
        runtime = open_runtime(built, Config(num_threads=number, enable_hmt=False, cpu_kernels="onnxruntime"))
        found = psutil.Process().num_threads() - before
        runtime.close()
        return found

    assert threads(6) - threads(3) == 3  # one of them is the caller's


@pytest.mark.effect("cpu_kernels", "enable_kernel_fusion")
@pytest.mark.skipif(cpu.variant() is None, reason="our kernels do not run on this CPU")
def test_kernels_are_chosen_and_whether_they_are_fused(built, caplog):
    def opened(**keys):
        """Whether our own kernels run, and how far ONNX Runtime's graph is fused."""
        caplog.clear()
        with caplog.at_level("INFO"):
            runtime = open_runtime(built, Config(enable_hmt=False, max_batch_size=1, max_context_length=256, **keys))
        level = runtime._session.get_session_options().graph_optimization_level
        runtime.close()
        return "quantized products run on own kernels" in caplog.text, level

    everything, basic = GraphOptimizationLevel.ORT_ENABLE_ALL, GraphOptimizationLevel.ORT_ENABLE_BASIC
    assert opened() == (True, everything)
    assert opened(cpu_kernels="onnxruntime") == (False, everything)
    assert opened(enable_kernel_fusion=False) == (False, basic)
