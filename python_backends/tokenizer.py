"""First stage: what the user sends → token ids, the places of the pictures' soft tokens, and the encoded pictures."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from python_backends import config, contract, triton_io
from python_backends.prompt import open_tokenizer
from python_backends.tracing import Tracing

MODEL = contract.MODELS[contract.TOKENIZER]
INPUTS = ("text_input", "messages", "image", "tools", "tool_choice")
"""In the order of `PromptTokenizer`."""
THREADS = 8
"""Requests tokenized at once."""


class TritonPythonModel:
    """The `tokenizer` model."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load tokenizer and template of the repository's build.

        Raises:
            ArtifactError, ConfigError: with what to do; Triton shows it as the reason the model did not load.
        """
        settings = config.load(triton_io.repository(args))
        triton_io.start_logging(contract.TOKENIZER, settings)
        self._tracing = Tracing(contract.TOKENIZER, settings)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library's own threads; each request has one of ours
        self._tokenizer = open_tokenizer(triton_io.repository(args))
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="wicore-tokenize")

    def execute(self, requests: Sequence[Any]) -> None:
        """Answer each request from a thread: a long prompt takes 100 ms, and short ones do not wait for it."""
        for request in requests:
            self._threads.submit(triton_io.send_answer, request, MODEL, self._answer)

    def finalize(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._tracing.close()

    def _answer(self, request: Any) -> dict[str, triton_io.Value]:
        with self._tracing.span(contract.TOKENIZER, triton_io.traceparent(request)) as span:
            prompt = self._tokenizer(*(triton_io.text(request, name) for name in INPUTS))
            span.set(gen_ai__usage__input_tokens=len(prompt.input_ids), wicore__images=len(prompt.image_starts))
        return {
            contract.INPUT_IDS.name: prompt.input_ids,
            contract.IMAGE_STARTS.name: prompt.image_starts,
            contract.IMAGE_BYTES.name: prompt.image_bytes,
        }
