"""Fetching against a folder laid out like the hub's cache, and against a small server that plays a
hub in all moods."""

from __future__ import annotations

import hashlib
import http.server
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

import models
from models import registry
from models.preset import Source
from models.weights import checkpoints, conversions, hub
from models.weights.checkpoints import CheckpointError
from tests.hubs import point_at, serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SOURCE = Source("tiny.pth", "someone/tiny")
BOUND = 20  # seconds that any failure may take here, with the timeouts of `quick`


@pytest.fixture(autouse=True)
def online(offline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    torch.save({"model": {"weight": torch.arange(30_000.0)}}, tmp_path / "original.pth")
    return (tmp_path / "original.pth").read_bytes()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def cache_like_the_hub(folder: Path, source: Source, data: bytes, blob: str | None = None) -> Path:
    """What huggingface_hub leaves: blobs by hash, snapshots by commit that link to them, branches
    as refs."""
    repo = folder / ("models--" + source.repo.replace("/", "--"))
    commit = COMMIT if source.revision == "main" else source.revision
    for name in ("blobs", f"snapshots/{commit}", "refs"):
        (repo / name).mkdir(parents=True, exist_ok=True)
    (repo / "blobs" / (blob or sha256(data))).write_bytes(data)
    (repo / "refs" / "main").write_text(COMMIT)
    link = repo / "snapshots" / commit / source.file
    link.symlink_to(repo / "blobs" / (blob or sha256(data)))
    return link


@dataclass
class Hub:
    """A hub with one file; `mood` says how it serves it."""

    content: bytes
    mood: str = "good"
    url: str = ""
    requests: list[str] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        if "/resolve/" in request.path:  # the library also asks for lists of its own
            self.requests.append(f"{request.command} {request.path}")
        mood = self.mood
        head = request.command == "HEAD"
        if mood == "silent":
            self.released.wait(BOUND)
            return
        codes = {"down": 503, "no repository": 401, "no revision": 404, "no file": 404}
        if mood in codes or not request.path.endswith("/tiny.pth"):
            request.send_response(codes.get(mood, 404))
            named = {
                "no repository": "RepoNotFound",
                "no revision": "RevisionNotFound",
                "no file": "EntryNotFound",
            }
            request.send_header("X-Error-Code", named.get(mood, ""))
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        body = self.content[::-1] if mood == "wrong" else self.content
        request.send_response(200)
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("ETag", f'"{sha256(self.content)}"')
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if head:
            return
        request.wfile.write(body if mood in ("good", "wrong") else body[: len(body) // 2])
        if mood == "stalls":
            request.wfile.flush()
            self.released.wait(BOUND)


@pytest.fixture
def server(content: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    played = Hub(content)
    with serving(played.answer) as url:
        played.url = url
        point_at(url, monkeypatch)
        yield played
        played.released.set()


def refusal(source: Source) -> str:
    begin = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        registry.locate_weights(source)
    assert time.monotonic() - begin < BOUND
    text = str(caught.value)
    assert "\n" not in text
    assert source.file in text
    assert source.repo in text
    assert text.endswith("give its path: model.weights=PATH, or --weights PATH")
    return text


def test_a_good_hub_is_asked_once(server: Hub) -> None:
    path = registry.locate_weights(SOURCE)
    assert torch.equal(checkpoints.read_checkpoint(path)["weight"], torch.arange(30_000.0))
    assert server.requests == [
        f"{method} /someone/tiny/resolve/main/tiny.pth" for method in ("HEAD", "HEAD", "GET")
    ]
    server.mood = "down"
    assert registry.locate_weights(SOURCE) == path  # the conversion is found without the hub
    assert len(server.requests) == 3
    assert registry.known_places(SOURCE)["cache"] == path
    assert registry.known_places(SOURCE)["hub's cache"].name == "tiny.pth"


def test_a_pinned_revision_and_hash(server: Hub) -> None:
    pinned = replace(SOURCE, revision=COMMIT, sha256=sha256(server.content))
    registry.locate_weights(pinned)
    assert server.requests[0] == f"HEAD /someone/tiny/resolve/{COMMIT}/tiny.pth"
    # the hash is what counts
    assert registry.known_places(replace(pinned, repo="another/mirror"))["cache"] is not None


FAILURES = {
    "down": "the hub answers 503",
    "silent": "the hub cannot be reached",
    "no repository": "no such public repository",
    "no revision": "no such revision",
    "no file": "no such file in the repository",
}


@pytest.mark.parametrize("mood", FAILURES)
def test_hubs_that_do_not_give_the_file(server: Hub, mood: str) -> None:
    server.mood = mood
    assert FAILURES[mood] in refusal(SOURCE)


@pytest.mark.parametrize("mood", ["stalls", "truncates"])
def test_hubs_that_give_half_of_the_file(server: Hub, mood: str, tmp_path: Path) -> None:
    server.mood = mood
    assert "of someone/tiny at revision main is not here (" in refusal(SOURCE)
    assert hub.cached_file(SOURCE) is None
    server.mood = "good"
    assert registry.locate_weights(SOURCE).is_relative_to(tmp_path / "cache")


@pytest.mark.parametrize("pin", [True, False], ids=["pinned", "named by the hub"])
def test_another_file_than_promised_is_refused(server: Hub, pin: bool) -> None:
    server.mood = "wrong"
    promised = sha256(server.content)
    source = replace(SOURCE, sha256=promised) if pin else SOURCE
    message = refusal(source)
    assert f"has sha256 {sha256(server.content[::-1])}, expected {promised}" in message
    assert registry.known_places(source)["cache"] is None
    server.mood = "good"
    registry.locate_weights(source)  # the refused file is not in the way


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    point_at("http://127.0.0.1:9", monkeypatch)
    assert "the hub cannot be reached" in refusal(SOURCE)


def test_offline_and_not_cached(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "not in the hub's cache, and HF_HUB_OFFLINE is set" in refusal(SOURCE)
    assert server.requests == []


@pytest.mark.parametrize("revision", ["main", "f" * 40])
def test_offline_the_hubs_own_cache_serves(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, revision: str
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    source = replace(SOURCE, revision=revision)
    link = cache_like_the_hub(tmp_path / "hub", source, content)
    assert registry.known_places(source) == {"cache": None, "hub's cache": link}
    path = registry.locate_weights(source)
    assert path.is_relative_to(tmp_path / "cache")
    assert conversions.known_digest(source) == sha256(content)


def test_a_damaged_blob_in_the_hubs_cache(
    tmp_path: Path, content: bytes, server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_like_the_hub(tmp_path / "hub", SOURCE, content[:-100], blob=sha256(content))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "is damaged, and fetching it again failed" in refusal(SOURCE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # online it is fetched again
    assert checkpoints.read_checkpoint(registry.locate_weights(SOURCE))["weight"].numel() == 30_000


def test_files_on_no_hub_want_a_path(server: Hub) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"mar_large/checkpoint-last.pth \(.*\) is on no hub; add it \(python -m",
    ):
        registry.locate_weights(models.PRESETS["mar_l"].weights)
    assert server.requests == []


def test_the_variables_of_the_library_reach_it(server: Hub, tmp_path: Path) -> None:
    """A process of its own, since huggingface_hub reads its variables when it is imported."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HUB_CACHE": str(tmp_path / "elsewhere"),
        "HF_HUB_OFFLINE": "0",
        "AR_PTQ_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    server.mood = "no file"
    command = [sys.executable, "-m", "models", "fetch", "rar_b"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(
        "error: weights: rar_b.bin of yucornetto/RAR at revision main is not here (no such"
    )
    assert "HEAD /yucornetto/RAR/resolve/main/rar_b.bin" in server.requests


def test_importing_the_package_does_not_import_the_hub() -> None:
    code = "import models, sys; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert huggingface_hub.__version__
