"""What a request says about the form of its answer: a response format, or tools to call."""

from __future__ import annotations

import dataclasses
import threading

from tokenizers import Tokenizer

from python_backends.decoder import response_format as formats
from python_backends.decoder.grammar import Grammar, GrammarCompiler
from python_backends.decoder.sequence import Request
from python_backends.decoder.token_bytes import TokenBytes
from python_backends.decoder.tools import call_grammar, read_request
from python_backends.errors import InvalidParameterError
from python_backends.manifest import ModelShape


class FormatReader:
    """Reads ``response_format``, ``tools`` and ``tool_choice``. Thread-safe.

    The vocabulary is prepared with the first request that needs it: a second and 190 MB for Gemma's 262,144 tokens.
    """

    def __init__(self, tokenizer: Tokenizer, model: ModelShape) -> None:
        self._tokenizer = tokenizer
        self._model = model
        self._lock = threading.Lock()
        self._ready: GrammarCompiler | None = None

    def apply(self, request: Request, *, response_format: str, tools: str, tool_choice: str) -> Request:
        """The request with its grammar and tools. The three are JSON; empty text where absent.

        Raises:
            InvalidParameterError: malformed, or asking for what excludes each other.
            OverloadedError: too many grammars are being compiled.
        """
        grammar: Grammar | None = None
        found, choice = read_request(tools, tool_choice)
        if found and (text := call_grammar(found, choice)) is not None:
            if response_format:
                raise InvalidParameterError("response_format and a required tool call exclude each other")
            grammar = self._compiler().compile_lark(text)
        elif response_format:
            grammar = self._compiler().compile(formats.parse(response_format))
        if grammar is not None and request.parameters.ignore_eos:
            raise InvalidParameterError("ignore_eos and a response format exclude each other")
        callable_tools = () if choice.mode == "none" else found
        return dataclasses.replace(request, grammar=grammar, tools=callable_tools)

    def _compiler(self) -> GrammarCompiler:
        with self._lock:
            if self._ready is None:
                tokens = TokenBytes(self._tokenizer, self._model.vocab_size, self._model.eos_token_ids)
                self._ready = GrammarCompiler(tokens)
            return self._ready
