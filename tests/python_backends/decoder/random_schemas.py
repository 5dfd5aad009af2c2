"""JSON schemas by seed, with a way to draw instances of them."""

import json
import random
from collections.abc import Callable
from typing import Any

Drawn = tuple[dict[str, Any], Callable[[], Any]]


def random_schema(rng: random.Random, depth: int = 0) -> Drawn:
    """A schema at most four levels deep, and a function that draws instances of it."""
    composites = [_object, _array, _any_of] * (3 if depth == 0 else 1) * (depth < 3)
    return rng.choice([_string, _pattern, _enum, _const, _integer, _number, _boolean, _null, *composites])(rng, depth)


def _string(rng: random.Random, _: int) -> Drawn:
    low, high = rng.randint(0, 2), rng.randint(2, 12)

    def draw() -> str:
        return "".join(rng.choice('ab é北"\\\n/😀z') for _ in range(rng.randint(low, high)))

    return {"type": "string", "minLength": low, "maxLength": high}, draw


def _pattern(rng: random.Random, _: int) -> Drawn:
    pattern, example = rng.choice([("^[a-c]{2,4}$", "abca"), (r"^\d{4}-\d{2}$", "2024-01"), ("^(yes|no)!?$", "no!")])
    return {"type": "string", "pattern": pattern}, lambda: example


def _enum(rng: random.Random, _: int) -> Drawn:
    values = rng.sample(["red", 7, None, True, "北京", 'a"b', -2.5], rng.randint(1, 4))
    return {"enum": values}, lambda: rng.choice(values)


def _const(rng: random.Random, _: int) -> Drawn:
    value = rng.choice(["fixed", 12, False, {"a": [1]}])
    return {"const": value}, lambda: value


def _integer(rng: random.Random, _: int) -> Drawn:
    low = rng.randint(-50, 50)
    high = low + rng.randint(0, 500)
    return {"type": "integer", "minimum": low, "maximum": high}, lambda: rng.randint(low, high)


def _number(rng: random.Random, _: int) -> Drawn:
    return {"type": "number", "minimum": -1, "exclusiveMaximum": 4}, lambda: rng.randint(-8, 31) / 8


def _boolean(rng: random.Random, _: int) -> Drawn:
    return {"type": "boolean"}, lambda: rng.random() < 0.5


def _null(_: random.Random, __: int) -> Drawn:
    return {"type": "null"}, lambda: None


def _any_of(rng: random.Random, depth: int) -> Drawn:
    options = [random_schema(rng, depth + 1) for _ in range(rng.randint(2, 3))]

    def draw() -> Any:
        return rng.choice(options)[1]()

    return {"anyOf": [schema for schema, _ in options]}, draw


def _array(rng: random.Random, depth: int) -> Drawn:
    items, draw = random_schema(rng, depth + 1)
    low, high = rng.randint(0, 1), rng.randint(1, 3)
    schema = {"type": "array", "items": items, "minItems": low, "maxItems": high}
    return schema, lambda: [draw() for _ in range(rng.randint(low, high))]


def _object(rng: random.Random, depth: int) -> Drawn:
    names = rng.sample(["name", "age", "x y", "città", "id", "tags"], rng.randint(1, 4))
    members = {name: random_schema(rng, depth + 1) for name in names}
    required = [name for name in names if rng.random() < 0.6]
    properties = {name: schema for name, (schema, _) in members.items()}
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    if depth == 0 and "$ref" not in json.dumps(properties) and rng.random() < 0.5:
        schema["$defs"] = {"first": properties[names[0]]}
        properties[names[0]] = {"$ref": "#/$defs/first"}
    return schema, lambda: {name: members[name][1]() for name in names if name in required or rng.random() < 0.5}
