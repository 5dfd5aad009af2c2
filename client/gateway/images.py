"""Pictures of a request: counted, fetched where that is allowed, and measured from their headers. No pixel is decoded.

The stages behind check all of this again, as other clients reach them too; here it keeps what is too much from being
sent at all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from urllib.parse import urlsplit

import aiohttp

from client.gateway.settings import GatewaySettings
from python_backends import pixels
from python_backends.errors import ImageCountError, ImageTooLargeError, InvalidImageError

FETCH_TIMEOUT_S = 15.0
CONNECT_TIMEOUT_S = 5.0
_FETCHED = ("http://", "https://")


class ImageReader:
    """Bytes of pictures from what clients send.

    Addresses are fetched from the hosts that the operator names, without following redirects, so that nobody can make
    the server look around in its own network.
    """

    def __init__(self, settings: GatewaySettings) -> None:
        self._hosts = settings.image_hosts
        self._max_images = settings.config.max_images
        self._limits = pixels.ImageLimits(settings.config.max_image_bytes, settings.config.max_image_pixels)
        pixels.allow_pixels(self._limits)

    async def read(self, sources: Sequence[str]) -> list[bytes]:
        """Base64, data URLs or addresses → encoded bytes, in order.

        Raises:
            ImageCountError: more than the server takes.
            InvalidImageError: not a picture, or an address that may not be fetched or gives none.
            ImageTooLargeError: too many bytes or pixels.
        """
        if len(sources) > self._max_images:
            raise ImageCountError(f"{len(sources)} images; this server takes at most {self._max_images} in one request")
        if not sources:
            return []
        fetched = await self._fetch([source for source in sources if _is_address(source)])
        return await asyncio.to_thread(self._decode, sources, fetched)

    def _decode(self, sources: Sequence[str], fetched: dict[str, bytes]) -> list[bytes]:
        found = []
        for source in sources:
            given = fetched.get(source) or source.encode("utf-8", "replace")
            data = pixels.encoded_bytes(given, self._limits)
            pixels.image_size(data, self._limits)
            found.append(data)
        return found

    async def _fetch(self, addresses: Sequence[str]) -> dict[str, bytes]:
        """Each address once."""
        for address in addresses:
            self._check(address)
        if not addresses:
            return {}
        timeout = aiohttp.ClientTimeout(total=FETCH_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        unique = list(dict.fromkeys(addresses))
        async with aiohttp.ClientSession(timeout=timeout, auto_decompress=False) as session:
            return dict(zip(unique, await asyncio.gather(*(self._get(session, each) for each in unique)), strict=True))

    def _check(self, address: str) -> None:
        if not self._hosts:
            raise InvalidImageError("this server fetches nothing; send the image's bytes as a data URL")
        try:
            host = urlsplit(address).hostname
        except ValueError as error:
            raise InvalidImageError(f"{address[:100]} is not an address: {error}") from error
        if host not in self._hosts:
            raise InvalidImageError(
                f"this server fetches no pictures from {host}; send the image's bytes as a data URL, or have the host "
                "added to image_hosts"
            )

    async def _get(self, session: aiohttp.ClientSession, address: str) -> bytes:
        limit = self._limits.max_bytes
        try:
            async with session.get(address, allow_redirects=False) as answer:
                if answer.status != 200:
                    raise InvalidImageError(f"{address[:100]} was answered with status {answer.status}, not a picture")
                data = bytearray()
                async for part in answer.content.iter_chunked(64 * 2**10):
                    data += part
                    if len(data) > limit:
                        raise ImageTooLargeError(f"{address[:100]} has more than {limit:,} bytes")
                return bytes(data)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            why = str(error) or type(error).__name__
            raise InvalidImageError(f"{address[:100]} could not be fetched: {why}") from error


def _is_address(source: str) -> bool:
    return source[:8].lower().startswith(_FETCHED)
