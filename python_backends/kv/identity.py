"""Identity of KV entries: a 256-bit hash chained over everything that their content depends on.

Keys and values of a token are a function of the model, its dtype and layout, and of every token and image before it
(within an image also of those after it, since its tokens see each other both ways: hence the whole image's hash). Equal
ids therefore mean interchangeable bytes. The salt makes them unequal between parties that must not share.

BLAKE2b (RFC 7693) with 32 bytes of digest and a personalization per kind of hash, so that no two kinds can collide.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from python_backends.kv.blocks import EntryId, EntryKey

ID_BYTES = 32
IDENTITY_VERSION = 1


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """Tokens ``start … end − 1`` of a prompt are one image."""

    start: int
    end: int
    content: bytes
    """32 bytes: hash of everything its embeddings are made of (pixels after preprocessing)."""


class EntryIds(Protocol):
    """What looking up needs of a prompt: `PromptIds`, or ids that a recorded trace names."""

    def __len__(self) -> int:
        """Tokens."""
        ...

    def block_id(self, index: int) -> EntryId:
        """See `PromptIds`."""
        ...

    def can_resume_at(self, length: int) -> bool:
        """See `PromptIds`."""
        ...

    def tail_id(self, length: int) -> EntryId:
        """See `PromptIds`."""
        ...


def _hash(kind: bytes, *parts: bytes) -> bytes:
    digest = blake2b(digest_size=ID_BYTES, person=kind)
    for part in parts:
        digest.update(part)
    return digest.digest()


def _sized(part: bytes) -> bytes:
    """With its length in front, so that neighbours cannot trade bytes."""
    return len(part).to_bytes(8, "little") + part


def content_hash(data: bytes | memoryview) -> bytes:
    """32 bytes naming an image by its preprocessed pixels; shape and dtype are the model's, hence the root's."""
    return _hash(b"wicore.image", bytes(data) if not isinstance(data, bytes) else data)


def salt_hash(cache_salt: str) -> bytes:
    """32 bytes for `EntryKey.salt`; the salt itself is written nowhere."""
    return _hash(b"wicore.salt", cache_salt.encode())


def root_id(*, fingerprint: bytes, dtype: str, layout_version: int, block_tokens: int, cache_salt: str) -> EntryId:
    """Parent of every first block: what all entries of one model, layout and salt have in common."""
    parts = (fingerprint, dtype.encode(), salt_hash(cache_salt))
    numbers = np.array([IDENTITY_VERSION, layout_version, block_tokens], dtype="<i8").tobytes()
    return _hash(b"wicore.root", numbers, *map(_sized, parts))


class PromptIds:
    """Tokens of one sequence and the ids of its entries, computed as they are asked for and kept.

    Args:
        tokens: [T] ids below 2**31.
        images: in order, not overlapping. One may end beyond the tokens that are there yet.
        root: `root_id`.
        block_tokens: tokens of a block.
        salt: `salt_hash`.

    Raises:
        ValueError: images that overlap, are empty or have no 32-byte hash.
    """

    def __init__(
        self,
        tokens: Sequence[int] | NDArray[np.int32],
        *,
        images: Iterable[ImageSpan] = (),
        root: EntryId,
        block_tokens: int,
        salt: bytes,
    ) -> None:
        self.root = root
        self.salt = salt
        self.block_tokens = block_tokens
        self.images = tuple(images)
        for image in self.images:
            if not 0 <= image.start < image.end or len(image.content) != ID_BYTES:
                raise ValueError(f"image {image.start}…{image.end} is empty or has no {ID_BYTES}-byte hash")
        if any(first.end > second.start for first, second in pairwise(self.images)):
            raise ValueError("images overlap or are out of order")
        self._tokens = bytearray(np.asarray(tokens, dtype="<i4").tobytes())
        self._chain: list[EntryId] = []

    def __len__(self) -> int:
        """Tokens."""
        return len(self._tokens) // 4

    @property
    def num_blocks(self) -> int:
        """Full blocks."""
        return len(self) // self.block_tokens

    def extend(self, tokens: Sequence[int] | NDArray[np.int32]) -> None:
        """Append generated tokens. Ids given out stay valid."""
        self._tokens += np.asarray(tokens, dtype="<i4").tobytes()

    def block_id(self, index: int) -> EntryId:
        """Id of full block ``index``; −1 is the root."""
        if index < 0:
            return self.root
        if index >= self.num_blocks:
            raise IndexError(f"block {index} of {self.num_blocks}")
        while len(self._chain) <= index:
            first = len(self._chain)
            parent = self._chain[-1] if first else self.root
            self._chain.append(self._span_id(b"wicore.block", parent, first * self.block_tokens, self.block_tokens))
        return self._chain[index]

    def can_resume_at(self, length: int) -> bool:
        """Whether a tail may end there: not within an image, whose tokens see those after them."""
        return 0 < length <= len(self) and not any(image.start < length < image.end for image in self.images)

    def tail_id(self, length: int) -> EntryId:
        """Id of the tail for resuming after ``length`` tokens.

        Raises:
            ValueError: no tail may end there.
        """
        if not self.can_resume_at(length):
            raise ValueError(f"no tail can end after {length} tokens")
        blocks, partial = divmod(length, self.block_tokens)
        return self._span_id(b"wicore.tail", self.block_id(blocks - 1), blocks * self.block_tokens, partial)

    def block_key(self, index: int, num_bytes: int) -> EntryKey:
        """Key of full block ``index``."""
        parent = self.block_id(index - 1)
        return EntryKey(self.block_id(index), "block", parent, (index + 1) * self.block_tokens, num_bytes, self.salt)

    def tail_key(self, length: int, num_bytes: int) -> EntryKey:
        """Key of the tail after ``length`` tokens. Raises ValueError as `tail_id`."""
        parent = self.block_id(length // self.block_tokens - 1)
        return EntryKey(self.tail_id(length), "tail", parent, length, num_bytes, self.salt)

    def _span_id(self, kind: bytes, parent: EntryId, start: int, count: int) -> EntryId:
        """Hash of ``count`` tokens from ``start`` on, behind ``parent``."""
        extras = b"".join(
            image.content + np.array([start - image.start, image.end - image.start], dtype="<i8").tobytes()
            for image in self.images
            if image.start < start + count and image.end > start
        )
        return _hash(
            kind, parent, count.to_bytes(8, "little"), bytes(self._tokens[4 * start : 4 * (start + count)]), extras
        )
