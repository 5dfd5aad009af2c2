"""llama.cpp as a peer, by its C interface through llama-cpp-python: batches of several sequences need it."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from client.bench.peers.protocol import Prompt, serve

BATCH_TOKENS = 512
"""llama.cpp's default for ``n_ubatch``, and here for ``n_batch`` too."""
WEIGHTS = {"packed": True, "plain": False}
"""Whether weights are repacked at load for the CPU's matrix instructions (``use_extra_bufts``)."""
FLASH = {
    "flash": llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "no flash": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}


class LlamaCpp:
    """A GGUF file with room for ``sequences`` sequences of ``context`` tokens."""

    def __init__(self, path: str, threads: int, sequences: int, context: int) -> None:
        llama_cpp.llama_backend_init()
        self._path = path
        self._threads, self._context_length, self._sequences = threads, context, sequences
        self._models: dict[str, Any] = {}
        self._contexts: dict[str, Any] = {}
        self._batch = llama_cpp.llama_batch_init(max(BATCH_TOKENS, sequences), 0, 1)
        self.use(self.variants()[0])
        vocab = llama_cpp.llama_model_get_vocab(next(iter(self._models.values())))
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)

    def variants(self) -> list[str]:
        """See `Peer.variants`: weights repacked or not, flash attention or not."""
        return [f"{weights}, {flash}" for weights, flash in itertools.product(WEIGHTS, FLASH)]

    def use(self, variant: str) -> None:
        """See `Peer.use`."""
        weights, flash = variant.split(", ")
        if weights not in self._models:
            self._models[weights] = self._load(WEIGHTS[weights])
        if variant not in self._contexts:
            self._contexts[variant] = self._make_context(self._models[weights], FLASH[flash])
        self._context = self._contexts[variant]

    def keep(self, variants: Sequence[str]) -> None:
        """See `Peer.keep`."""
        for name in [name for name in self._contexts if name not in variants]:
            llama_cpp.llama_free(self._contexts.pop(name))
        wanted = {variant.split(", ")[0] for variant in variants}
        for name in [name for name in self._models if name not in wanted]:
            llama_cpp.llama_model_free(self._models.pop(name))
        self.use(variants[0])

    def _load(self, packed: bool) -> Any:
        settings = llama_cpp.llama_model_default_params()
        settings.use_extra_bufts = packed
        model = llama_cpp.llama_model_load_from_file(self._path.encode(), settings)
        if not model:
            raise RuntimeError(f"{self._path} cannot be loaded")
        return model

    def _make_context(self, model: Any, flash: int) -> Any:
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = self._context_length * self._sequences
        settings.n_seq_max = self._sequences
        settings.n_batch = settings.n_ubatch = BATCH_TOKENS
        settings.n_threads = settings.n_threads_batch = self._threads
        settings.flash_attn_type = flash
        settings.swa_full = False  # windows of their own size, as its server has them
        context = llama_cpp.llama_init_from_model(model, settings)
        if not context:
            raise RuntimeError("llama.cpp made no context")
        return context

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """(token, position, sequence, whether its logits are wanted) of every token of one batch."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for index, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
            batch.logits[index] = wanted
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")

    def _row(self, index: int) -> NDArray[np.float32]:
        """Logits [V] of a token of the last batch, without a copy."""
        pointer = llama_cpp.llama_get_logits_ith(self._context, index)
        values: NDArray[np.float32] = np.ctypeslib.as_array(pointer, (self._vocab_size,))
        return values

    def _clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def _fill(self, prompt: Prompt, sequence: int) -> int:
        """Compute a prompt and draw the token after it."""
        last = len(prompt) - 1
        for start in range(0, len(prompt), BATCH_TOKENS):
            part = prompt[start : start + BATCH_TOKENS]
            self._decode([(token, start + i, sequence, start + i == last) for i, token in enumerate(part)])
        return int(self._row(last % BATCH_TOKENS).argmax())

    def prefill(self, prompt: Prompt) -> float:
        """See `Peer.prefill`."""
        self._clear()
        begin = time.perf_counter()
        self._fill(prompt, 0)
        return time.perf_counter() - begin

    def decode(self, prompts: Sequence[Prompt], tokens: int) -> list[float]:
        """See `Peer.decode`."""
        self._clear()
        drawn = [self._fill(prompt, sequence) for sequence, prompt in enumerate(prompts)]
        length, seconds = len(prompts[0]), []
        for position in range(length, length + tokens - 1):
            begin = time.perf_counter()
            self._decode([(token, position, sequence, True) for sequence, token in enumerate(drawn)])
            drawn = [int(self._row(sequence).argmax()) for sequence in range(len(prompts))]
            seconds.append(time.perf_counter() - begin)
        return seconds

    def logits(self, prompt: Prompt, last: int) -> NDArray[np.float32]:
        """See `Peer.logits`."""
        self._clear()
        first, rows = len(prompt) - last, []
        for start in range(0, len(prompt), BATCH_TOKENS):
            part = prompt[start : start + BATCH_TOKENS]
            self._decode([(token, start + i, 0, start + i >= first) for i, token in enumerate(part)])
            rows += [self._row(i).copy() for i in range(len(part)) if start + i >= first]
        return np.stack(rows)


if __name__ == "__main__":
    file, *numbers = sys.argv[1:]
    serve(LlamaCpp(file, *map(int, numbers)))
