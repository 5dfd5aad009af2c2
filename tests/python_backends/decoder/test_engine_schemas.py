"""JSON schemas through the engine: grammar, masks and draws of many requests at once, with the demo checkpoint."""

import json
import random

import jsonschema
from tokenizers import Tokenizer

from builders.checkpoint import open_checkpoint
from client.commands.demo import checkpoint_folder
from python_backends.config import Config
from python_backends.decoder.engine import Engine
from python_backends.decoder.grammar import GrammarCompiler
from python_backends.decoder.token_bytes import TokenBytes
from tests.driver import decoder
from tests.python_backends.decoder.callers import Caller
from tests.python_backends.decoder.random_schemas import random_schema

SCHEMAS = 200


def test_answers_to_200_random_schemas_are_valid_with_drafts_in_a_full_batch():
    checkpoint = checkpoint_folder()
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    ends = [tokenizer.token_to_id(token) for token in ("<eos>", "<end_of_turn>")]
    vocabulary = open_checkpoint(checkpoint).config.text.vocab_size
    compiler = GrammarCompiler(TokenBytes(tokenizer, vocabulary, ends))
    engine = Engine(decoder(checkpoint, num_slots=8, context=512), tokenizer, Config(max_queue=SCHEMAS, max_draft=3))
    asked = tokenizer.encode("JSON").ids
    schemas = [random_schema(random.Random(seed))[0] for seed in range(SCHEMAS)]
    callers = []
    for seed, schema in enumerate(schemas):
        grammar = compiler.compile({"type": "json_schema", "json_schema": {"schema": schema}})
        settings = {"max_tokens": 300, "ignore_eos": False, "temperature": float(seed % 2), "seed": seed}
        callers.append(Caller(asked, grammar=grammar, **settings).to(engine))
    finished = 0
    for schema, caller in zip(schemas, callers, strict=True):
        reason = caller.wait().last.finish_reason
        assert reason in {"stop", "length"}, caller.last.error
        if reason == "stop":
            finished += 1
            jsonschema.Draft202012Validator(schema).validate(json.loads(caller.text))
    engine.check_integrity()
    engine.close()
    assert finished >= 0.9 * SCHEMAS  # what is cut off at 300 tokens is no whole JSON
