"""A checkpoint by its hub id: downloaded once into huggingface_hub's cache, with its progress bars."""

from __future__ import annotations

import re
from pathlib import Path

from builders.checkpoint import INDEX_FILE, SINGLE_FILE
from builders.identity import SIDE_FILES
from python_backends.errors import BuildError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_PATTERNS = [*SIDE_FILES, INDEX_FILE, SINGLE_FILE, "model-*-of-*.safetensors"]


def resolve(source: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint given as a path or as a hub id (``google/gemma-3-4b-it``).

    An existing folder wins. A download that was interrupted is resumed; one that is complete is found offline.

    Raises:
        BuildError: neither a folder nor a hub id, a revision of a folder, or a download that fails: unknown, gated,
            offline.
    """
    folder = Path(source).expanduser()
    if folder.exists():
        if revision is not None:
            raise BuildError(f"{source} is a folder here, which has no revisions; leave --revision out")
        return folder
    if not _HUB_ID.fullmatch(source) or source.startswith("."):
        raise BuildError(
            f"{source} does not exist; pass the folder of a Gemma-3 checkpoint or a hub id such as google/gemma-3-4b-it"
        )
    return _download(source, revision)


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=_PATTERNS))
    except errors.GatedRepoError as error:
        raise BuildError(
            f"{hub_id} is gated: accept its licence on the model's page, then log in with `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise BuildError(f"{hub_id} has no revision {revision!r}; leave --revision out for the newest") from error
    except errors.RepositoryNotFoundError as error:
        raise BuildError(
            f"{hub_id} is not known to the hub, and there is no such folder; check the spelling, and log in with "
            "`hf auth login` if the model is private"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise BuildError(
            f"{hub_id} is no folder here, not in the download cache, and the hub cannot be reached; "
            "connect, or copy the checkpoint folder to this machine and pass its path"
        ) from error
    except Exception as error:  # the library lets its transports' own exceptions through
        raise BuildError(f"downloading {hub_id} failed: {error}; run the command again to resume it") from error
