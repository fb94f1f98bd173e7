"""Exports as repositories of the Hugging Face hub, through `huggingface_hub`.

The library's own variables apply: HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE, HF_HUB_CACHE.
"""

from __future__ import annotations

import re
from pathlib import Path

from ptq.int8.exports.export_files import CONFIG, TENSORS, ExportError
from ptq.use.card import CARD

NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # organisation/repository


def is_repository_name(text: str) -> bool:
    return NAME.fullmatch(text) is not None


def require_repository_name(text: str) -> None:
    """Refuse what is no name of a repository.

    Raises:
        ExportError: it is none.
    """
    if not is_repository_name(text):
        raise ExportError(f"push_to_hub: {text!r} is not the name of one, organisation/repository")


def fetch_export(name: str, revision: str | None = None) -> Path:
    """The folder of a repository's export in the hub's cache, downloaded if need be.

    Raises:
        ExportError: it cannot be had; one line that says why.
    """
    try:
        folder = _download_file(name, CONFIG, revision).parent
        # a folder of the cache is called by its commit: both files are of one
        _download_file(name, TENSORS, folder.name)
        return folder
    except Exception as error:  # errors of the library, of its HTTP client, of the disk
        raise ExportError(f"export: {name} is not here ({describe_error(error)})") from error


def _download_file(name: str, file: str, revision: str | None) -> Path:
    """A file of a repository in the hub's cache; without an answer it fails after one time-out,
    where the library alone would try for minutes."""
    from huggingface_hub import (
        constants,
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )

    if not isinstance(try_to_load_from_cache(name, file, revision=revision), str):
        url = hf_hub_url(name, file, revision=revision)
        get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    return Path(hf_hub_download(name, file, revision=revision))


def push_folder(folder: Path, name: str, private: bool = False) -> None:
    """Upload a folder's export, into a repository that is made if there is none.

    Raises:
        ExportError: the hub refuses it; one line that says why.
    """
    from huggingface_hub import HfApi

    try:
        hub = HfApi()
        hub.create_repo(name, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=[CONFIG, TENSORS, CARD],
            commit_message="Upload a quantized model",
        )
    except Exception as error:  # errors of the library, of its HTTP client, of the disk
        raise ExportError(
            f"push_to_hub: {name} was not uploaded ({describe_error(error)}); "
            f"the export is in {folder}"
        ) from error


def describe_error(error: Exception) -> str:
    """Why the hub did not do what it was asked to, in a line."""
    from huggingface_hub import constants, errors

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    known = (
        (errors.LocalEntryNotFoundError, "not in the hub's cache, and the hub cannot be reached"),
        (errors.GatedRepoError, "the repository wants a login"),
        (errors.RepositoryNotFoundError, "no such repository, or none that this login may see"),
        (errors.RevisionNotFoundError, "no such revision"),
        (errors.EntryNotFoundError, "no such file in the repository"),
    )
    for kind, text in known:
        if isinstance(error, kind):
            return text
    if isinstance(error, errors.HfHubHTTPError):
        return f"the hub answers {error.response.status_code}"
    if isinstance(error, errors.HTTPError):
        return "the hub cannot be reached"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:160]
