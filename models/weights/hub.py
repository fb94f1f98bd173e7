"""Weights files from the hub: found in its cache or downloaded by huggingface_hub, checked by hash.

The library's own variables apply: HF_HUB_OFFLINE, HF_ENDPOINT, HF_HOME and HF_HUB_CACHE, HF_TOKEN,
HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT (seconds without a byte before it tries again, at
most five times in a row).
"""

from __future__ import annotations

import re
from pathlib import Path

from models.preset import Source
from models.weights.checkpoints import CheckpointError, first_line
from models.weights.digests import file_digest

# a server that breaks off and starts again is left after sending this many times the file's size
GIVE_UP = 3


def cached_file(source: Source) -> Path | None:
    """The file in the hub's local cache, not checked, or None."""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(source.repo, source.file, revision=source.revision)
    return Path(cached) if isinstance(cached, str) else None


def fetch_file(source: Source) -> tuple[Path, str]:
    """Path and sha256 of the file, downloaded if need be; a damaged file is downloaded once more.

    The hash must be the pinned one. Without a pin it must be the one under which the hub's cache
    stores large files.

    Raises:
        CheckpointError: offline and not cached, no such file, the hub cannot be reached, or the
            hash differs.
    """
    path = _download_file(source)
    sha256 = file_digest(path)
    if sha256 == _expected_digest(source, path, sha256):
        return path, sha256
    try:
        path = _download_file(source, again=True)
    except CheckpointError as error:
        raise CheckpointError(
            f"weights: {path} is damaged, and fetching it again failed: {error}"
        ) from error
    sha256 = file_digest(path)
    expected = _expected_digest(source, path, sha256)
    if sha256 != expected:
        raise CheckpointError(
            f"weights: {source} has sha256 {sha256}, expected {expected}; it is not used"
        )
    return path, sha256


def _expected_digest(source: Source, path: Path, default: str) -> str:
    """The pinned hash, or the name of the cache's blob, which is the sha256 of large files."""
    if source.sha256:
        return source.sha256
    blob = path.resolve().name
    return blob if re.fullmatch("[0-9a-f]{64}", blob) else default


def _download_file(source: Source, again: bool = False) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        if again or cached_file(source) is None:
            _ask_hub(source)
        return Path(
            hf_hub_download(
                source.repo,
                source.file,
                revision=source.revision,
                force_download=again,
                tqdm_class=_bounded_progress(),
            )
        )
    except Exception as error:  # errors of the library, of its HTTP client, of the disk
        raise CheckpointError(
            f"weights: {source} is not here ({_download_error(error)})"
        ) from error


def _ask_hub(source: Source) -> None:
    """Fail at once, or after one time-out, if the hub cannot give the file.

    The library alone would try for minutes.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(source.repo, source.file, revision=source.revision)
    get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)


def _bounded_progress() -> type:
    """A progress bar that stops a download which starts over and over."""
    from huggingface_hub.utils import tqdm

    class Progress(tqdm):
        received = 0

        def update(self, n: float | None = 1) -> bool | None:
            self.received += max(n or 0, 0)
            if self.total and self.received > GIVE_UP * self.total:
                raise OSError("the server breaks off again and again")
            return super().update(n)

    return Progress


def _download_error(error: Exception) -> str:
    from huggingface_hub import constants, errors

    if constants.is_offline_mode():
        return "not in the hub's cache, and HF_HUB_OFFLINE is set"
    known = (
        (errors.LocalEntryNotFoundError, "not in the hub's cache, and the hub cannot be reached"),
        (errors.GatedRepoError, "the repository wants a login"),
        (errors.RepositoryNotFoundError, "no such public repository"),
        (errors.RevisionNotFoundError, "no such revision"),
        (errors.EntryNotFoundError, "no such file in the repository"),
    )
    for kind, text in known:
        if isinstance(error, kind):
            return text
    if isinstance(error, errors.HfHubHTTPError):
        return f"the hub answers {error.response.status_code}"
    gist = first_line(error)
    return f"the hub cannot be reached: {gist}" if isinstance(error, errors.HTTPError) else gist
