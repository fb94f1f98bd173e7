"""Exports as repositories: uploaded to a server that plays the hub, and loaded from there."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

import ptq
from tests.hubs import point_at, serving
from tests.ptq.use.test_use import made_up, outputs, quantized

REPOSITORY = "someone/rar-w8a8"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """A hub that keeps files by repository; with a `refusal`, a status, it does nothing else."""

    url: str = ""
    refusal: int | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)  # by sha256, until they are committed
    requests: list[str] = field(default_factory=list)
    private: bool | None = None

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        self.requests.append(f"{request.command} {path}")
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if self.refusal is not None:
            reply(request, self.refusal)
        elif "/resolve/" in path:
            self.give_file(request, *path.lstrip("/").split("/resolve/"))
        elif path.startswith("/large/"):
            self.large[path.removeprefix("/large/")] = body
            reply(request, 200)
        else:
            answered = self.answer_api(path, body)
            reply(request, 404 if answered is None else 200, json.dumps(answered).encode())

    def answer_api(self, path: str, body: bytes) -> object:
        if path == "/api/repos/create":
            asked = json.loads(body)
            self.private = asked.get("visibility") == "private" or asked.get("private")
            return {"url": f"{self.url}/{REPOSITORY}"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path == f"/api/models/{REPOSITORY}/preupload/main":
            return {"files": [upload_mode(entry["path"]) for entry in json.loads(body)["files"]]}
        if path == f"/{REPOSITORY}.git/info/lfs/objects/batch":
            objects = []
            for entry in json.loads(body)["objects"]:
                upload = {"href": f"{self.url}/large/{entry['oid']}", "header": {}}
                objects.append({**entry, "actions": {"upload": upload}})
            return {"transfer": "basic", "objects": objects}
        if path == f"/api/models/{REPOSITORY}/commit/main":
            for line in body.splitlines():
                self.keep_file(**json.loads(line))
            return {"commitUrl": f"{self.url}/{REPOSITORY}/commit/{COMMIT}", "commitOid": COMMIT}
        return None

    def keep_file(self, key: str, value: dict) -> None:
        if key == "file":
            self.files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            self.files[value["path"]] = self.large.pop(value["oid"])

    def give_file(
        self, request: http.server.BaseHTTPRequestHandler, repository: str, place: str
    ) -> None:
        content = self.files.get(place.partition("/")[2])
        if repository != REPOSITORY or content is None:
            code = "RepoNotFound" if repository != REPOSITORY else "EntryNotFound"
            reply(request, 404, headers={"X-Error-Code": code})
            return
        sha256 = hashlib.sha256(content).hexdigest()
        reply(request, 200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{sha256}"'})


def upload_mode(path: str) -> dict[str, object]:
    mode = "lfs" if path.endswith(".safetensors") else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False}


def reply(
    request: http.server.BaseHTTPRequestHandler,
    status: int,
    content: bytes = b"",
    headers: dict[str, str] | None = None,
) -> None:
    request.send_response(status)
    for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
        request.send_header(name, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(content)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    played = Hub()
    with serving(played.answer) as url:
        played.url = url
        point_at(url, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the server has none
        yield played


def test_what_is_pushed_is_what_is_loaded(hub: Hub, tmp_path: Path) -> None:
    model = quantized("rar", "smoothquant")
    folder = ptq.save(model, tmp_path / "export", push_to_hub=REPOSITORY, private=True)
    assert hub.private
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    loaded = ptq.load(REPOSITORY, made_up("rar"))
    expected = ptq.load(folder, made_up("rar"))
    assert torch.equal(outputs(loaded.adapter, "rar"), outputs(expected.adapter, "rar"))

    asked = len([line for line in hub.requests if line.startswith("GET ")])
    hub.refusal = 503  # what is cached serves
    ptq.load(REPOSITORY, made_up("rar"), revision=COMMIT)
    assert len([line for line in hub.requests if line.startswith("GET ")]) == asked


def test_a_folder_of_that_name_comes_first(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ptq.save(quantized("rar", "rtn"), REPOSITORY)
    ptq.load(REPOSITORY, made_up("rar"))
    assert not hub.requests


def test_a_file_that_was_changed_on_the_hub_is_refused(hub: Hub, tmp_path: Path) -> None:
    ptq.save(quantized("rar", "rtn"), tmp_path / "export", push_to_hub=REPOSITORY)
    hub.files["model.safetensors"] = hub.files["model.safetensors"][::-1]
    with pytest.raises(ptq.ExportError, match="its sha256 differs"):
        ptq.load(REPOSITORY, made_up("rar"))


def test_what_the_hub_refuses_is_said_in_one_line(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = "^export: someone/else is not here .no such repository, or none that this login"
    with pytest.raises(ptq.ExportError, match=missing):
        ptq.load("someone/else", made_up("rar"))
    with pytest.raises(ptq.ExportError, match="is not here .no such file in the repository.$"):
        ptq.load(REPOSITORY, made_up("rar"))
    hub.refusal = 403
    refused = "^push_to_hub: someone/rar-w8a8 was not uploaded .the hub answers 403.; the export"
    with pytest.raises(ptq.ExportError, match=refused):
        ptq.save(quantized("rar", "rtn"), tmp_path / "export", push_to_hub=REPOSITORY)
    assert (tmp_path / "export" / "config.json").is_file()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ptq.ExportError, match="is not here .HF_HUB_OFFLINE is set.$"):
        ptq.load("someone/else", made_up("rar"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    point_at("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(ptq.ExportError, match="is not here .the hub cannot be reached.$"):
        ptq.load("someone/else", made_up("rar"))
