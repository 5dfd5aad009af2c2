"""llama.cpp as a peer, by its C interface through llama-cpp-python: batches of several sequences need it."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from client.bench.peers.protocol import Prompt, serve

BATCH_TOKENS = 512
"""llama.cpp's default for both of its batch sizes."""


class LlamaCpp:
    """A GGUF file with room for ``sequences`` sequences of ``context`` tokens; its defaults otherwise."""

    def __init__(self, path: str, threads: int, sequences: int, context: int) -> None:
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"{path} cannot be loaded")
        self._threads, self._context_length, self._sequences = threads, context, sequences
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._context = self._make_context()
        self._batch = llama_cpp.llama_batch_init(max(BATCH_TOKENS, sequences), 0, 1)

    def _make_context(self) -> Any:
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = self._context_length * self._sequences
        settings.n_seq_max = self._sequences
        settings.n_batch = settings.n_ubatch = BATCH_TOKENS
        settings.n_threads = settings.n_threads_batch = self._threads
        context = llama_cpp.llama_init_from_model(self._model, settings)
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

    def logits(self, prompt: Prompt) -> NDArray[np.float32]:
        """See `Peer.logits`; the prompt must fit one batch."""
        self._clear()
        self._decode([(token, index, 0, True) for index, token in enumerate(prompt)])
        return np.stack([self._row(index) for index in range(len(prompt))])


if __name__ == "__main__":
    path, *numbers = sys.argv[1:]
    serve(LlamaCpp(path, *map(int, numbers)))
