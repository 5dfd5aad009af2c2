"""One tree of exceptions, and the one place where each is given its code, its Triton code and its HTTP status.

A stage raises; `triton_io` turns the exception into a Triton error whose message starts with ``<code>: ``; the client
reads that prefix and raises the same class again. Anything outside the tree is a bug: it is logged with its traceback
by the server and reaches the client as `InternalError` without one.
"""

from __future__ import annotations

from typing import ClassVar


class WiCoreError(Exception):
    """Root of the tree. ``code`` is stable and machine-readable; the message tells a person what to do."""

    code: ClassVar[str] = "internal"
    triton_code: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __str__(self) -> str:
        return f"{self.code}: {super().__str__()}"

    @property
    def message(self) -> str:
        """The text without the code prefix."""
        return super().__str__()


class InternalError(WiCoreError):
    """A fault of ours; the server's log has the details."""


class InvalidRequestError(WiCoreError):
    """The request can never succeed as it stands."""

    code = "invalid_request"
    triton_code = "INVALID_ARG"
    http_status = 400


class InvalidParameterError(InvalidRequestError):
    """A sampling or limit value is outside its range."""

    code = "invalid_parameter"


class InvalidMessagesError(InvalidRequestError):
    """``messages`` is not valid JSON, or not a conversation the chat template accepts."""

    code = "invalid_messages"


class EmptyPromptError(InvalidRequestError):
    """Nothing to answer: the prompt has no text and no image."""

    code = "empty_prompt"


class InvalidTextError(InvalidRequestError):
    """Text that is not valid UTF-8."""

    code = "invalid_text"


class InvalidImageError(InvalidRequestError):
    """Bytes that are not a readable image."""

    code = "invalid_image"


class ImageTooLargeError(InvalidImageError):
    """An image refused from its header, before any pixel is decoded."""

    code = "image_too_large"


class ImageCountError(InvalidRequestError):
    """The number of images does not fit the prompt's placeholders or the limit."""

    code = "image_count"


class ImagesNotSupportedError(InvalidRequestError):
    """An image was sent to a text-only model."""

    code = "images_not_supported"


class ContextLengthError(InvalidRequestError):
    """Prompt and answer do not fit the context."""

    code = "context_length"


class UnsupportedFeatureError(InvalidRequestError):
    """A part of the contract that this build of the server does not offer."""

    code = "unsupported"
    triton_code = "UNSUPPORTED"
    http_status = 400
    """Not 501: clients send a request again after a status from 500 on, and this one can never succeed."""


class RequestTooLargeError(InvalidRequestError):
    """More bytes than the gateway takes."""

    code = "request_too_large"
    http_status = 413


class UnknownModelError(InvalidRequestError):
    """The request names a model that is not served here."""

    code = "model_not_found"
    http_status = 404


class AuthenticationError(WiCoreError):
    """No API key, or one that is not valid."""

    code = "invalid_api_key"
    triton_code = "INVALID_ARG"
    http_status = 401


class RateLimitedError(WiCoreError):
    """The key's share is used up for now; ``retry_after_s`` tells when there is some again."""

    code = "rate_limited"
    triton_code = "UNAVAILABLE"
    http_status = 429
    retryable = True

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class SessionNotFoundError(InvalidRequestError):
    """A session of that name and salt that the KV cache knows nothing of, or nothing any more."""

    code = "session_not_found"
    http_status = 404


class OverloadedError(WiCoreError):
    """Refused at once because the queue is full; try again later."""

    code = "overloaded"
    triton_code = "UNAVAILABLE"
    http_status = 503
    retryable = True


class DeadlineExceededError(WiCoreError):
    """The request's deadline or queue timeout passed."""

    code = "deadline_exceeded"
    triton_code = "UNAVAILABLE"
    http_status = 504
    retryable = True


class CancelledError(WiCoreError):
    """The caller stopped the request or went away."""

    code = "cancelled"
    triton_code = "CANCELLED"
    http_status = 499


class ConfigError(WiCoreError):
    """wicore.json cannot be used."""

    code = "config"


class ArtifactError(WiCoreError):
    """A build output is missing, corrupt or of another version; the message says how to rebuild it."""

    code = "artifact"
    triton_code = "UNAVAILABLE"
    http_status = 503


class BuildError(WiCoreError):
    """A checkpoint cannot be read or converted."""

    code = "build"


class TierError(WiCoreError):
    """A tier of the KV cache did not do what was asked; the cache goes on without, nothing of it reaches a client.

    ``reason`` is one word for the counters.
    """

    code = "tier"

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class TierFullError(TierError):
    """No room for an entry: "room", "disk" (the file system is full or at its floor), "budget" (written enough)."""

    code = "tier_full"


class TierIoError(TierError):
    """The medium failed: "io", "paused" (left alone after repeated failures), "closed"."""

    code = "tier_io"


class EntryLostError(TierError):
    """An entry cannot be read back, so it is recomputed: "missing", "short", "checksum", "identity", "io", "late"…"""

    code = "entry_lost"


class TierLockedError(TierError):
    """Another server uses the folder."""

    code = "tier_locked"


class ServerStartError(WiCoreError):
    """tritonserver could not be started or did not become ready."""

    code = "server_start"


class ServerUnavailableError(WiCoreError):
    """No server answers at the address."""

    code = "server_unavailable"
    triton_code = "UNAVAILABLE"
    http_status = 503
    retryable = True


def _tree(cls: type[WiCoreError]) -> list[type[WiCoreError]]:
    return [cls, *(found for child in cls.__subclasses__() for found in _tree(child))]


BY_CODE: dict[str, type[WiCoreError]] = {cls.code: cls for cls in reversed(_tree(WiCoreError))}


def from_message(text: str) -> WiCoreError | None:
    """Rebuild the exception from a Triton error message that holds ``<code>: <message>``; None if it is not ours.

    Triton puts its own words in front when a stage of an ensemble fails ("in ensemble 'gemma3', …"), so the code is
    looked for behind each ``, `` and at the start.
    """
    candidates = [text]
    if text.startswith("in ensemble"):
        candidates.append(text.partition(", ")[2])
    for candidate in candidates:
        code, colon, message = candidate.strip().partition(": ")
        if colon and code in BY_CODE:
            return BY_CODE[code](message)
    return None
