"""`wicore session`: what a running server keeps of a conversation."""

from __future__ import annotations

import dataclasses
from typing import Annotated, cast, get_args

import typer

from client.commands.options import Address, AsJson
from client.commands.terminal import command, emit
from client.connection import DEFAULT_ADDRESS

ACTIONS = "show, pin, unpin, save, restore, prefetch or erase"


@command
def session(
    action: Annotated[str, typer.Argument(help=f"{ACTIONS}.")],
    name: Annotated[str, typer.Argument(help="The session that requests named.")],
    *,
    salt: Annotated[str, typer.Option(help="The cache_salt of its requests.")] = "",
    address: Address = DEFAULT_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """Look after the KV cache of a named conversation, pictures included.

    pin keeps it, and what its later requests leave, until unpin: on disk too, so it outlives a restart. save copies it
    to disk once; restore brings it into memory, and prefetch only begins that; erase forgets it, on disk as well.

    wicore session pin holiday-photos

    wicore session show holiday-photos --json
    """
    from client.client import Client
    from client.commands.stats import size
    from client.sessions import SessionAction
    from python_backends.errors import InvalidParameterError

    if action not in get_args(SessionAction):
        raise InvalidParameterError(f"a session cannot {action!r}; it can {ACTIONS}")
    with Client(address) as client:
        state = client.session(name, cast("SessionAction", action), cache_salt=salt)
    if as_json:
        emit({"session": name, "action": action, **dataclasses.asdict(state)})
        return
    where = ", ".join(f"{size(count)} on {tier}" for tier, count in state.bytes.items() if count) or "nothing held"
    print(f"{name}: {state.tokens:,} tokens, {where}{', pinned' if state.pinned else ''}")
