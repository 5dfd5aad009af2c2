"""`wicore keys`: who may ask the gateway."""

from __future__ import annotations

from typing import Annotated

import typer

from client.commands.options import DEFAULT_REPOSITORY, AsJson, Repository
from client.commands.terminal import command, emit, say

Name = Annotated[str, typer.Argument(help="Whose key it is.")]


@command
def add(
    name: Name,
    *,
    repository: Repository = DEFAULT_REPOSITORY,
    concurrent: Annotated[
        int, typer.Option(min=0, help="Requests in flight at most. [default: max_concurrent_requests of wicore.json]")
    ] = 0,
    per_minute: Annotated[
        int, typer.Option(min=0, help="Requests in a minute at most. [default: max_requests_per_minute of wicore.json]")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it; it is kept as a hash and cannot be shown again. From the first on, a key is needed."""
    from client.gateway import keys
    from client.gateway.settings import KEYS_NAME

    made = keys.add(repository / KEYS_NAME, name, concurrent, per_minute)
    if as_json:
        emit({"name": name, "key": made})
    else:
        print(made)
        say("Keep it; it cannot be shown again. Clients send it as: Authorization: Bearer KEY")


@command
def list_(*, repository: Repository = DEFAULT_REPOSITORY, as_json: AsJson = False) -> None:
    """Show the names and limits of the keys."""
    from client.gateway import keys
    from client.gateway.settings import KEYS_NAME

    for key in keys.load(repository / KEYS_NAME):
        limits = {"concurrent": key.max_concurrent_requests, "per_minute": key.max_requests_per_minute}
        if as_json:
            emit({"name": key.name, "created": key.created, **limits})
        else:
            print(key.name, *(f"{name}={value}" for name, value in limits.items() if value))


@command
def remove(name: Name, *, repository: Repository = DEFAULT_REPOSITORY) -> None:
    """Take a key away; a running gateway refuses it within a second."""
    from client.gateway import keys
    from client.gateway.settings import KEYS_NAME

    keys.remove(repository / KEYS_NAME, name)
