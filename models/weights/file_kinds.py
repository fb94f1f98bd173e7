"""What a file is that is not what its name says, in words for an error."""

from __future__ import annotations

from pathlib import Path

HEAD = 512  # bytes that tell
PAGES = (b"<!doctype html", b"<html", b"<?xml", b"<head", b"<body")
SIGNATURES = {
    b"\x89PNG\r\n\x1a\n": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"RIFF": "a RIFF file (WebP or the like)",
    b"%PDF": "a PDF file",
    b"\x1f\x8b": "a gzip archive, unpack it first",
    b"BZh": "a bzip2 archive, unpack it first",
    b"\xfd7zXZ": "an xz archive, unpack it first",
    b"\x89HDF": "an HDF5 file",
    b"GGUF": "a GGUF file",
    b"\x93NUMPY": "a NumPy array (.npy)",
    b"PK\x03\x04": "a zip archive (PyTorch's format, or npz)",
}


def describe_foreign(path: Path, expected: str = "") -> str | None:
    """What a file is, recognized by its first bytes.

    None if it is of none of the known kinds, or of the expected one (first word of its
    description, `PNG` or `zip`).
    """
    words = _describe_head(path)
    return None if words is None or (expected and f" {expected} " in words) else words


def _describe_head(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError:
        return None
    if not head:
        return "an empty file"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself (git lfs pull fetches it)"
    if head.startswith(b"version https://hawser"):
        return "a pointer of an old Git LFS, not the file itself (git lfs pull fetches it)"
    if b"/annex/objects/" in head[:200]:
        return "a git-annex pointer, not the file itself (git annex get fetches it)"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(PAGES):
        return "an HTML page, as a failed download leaves it"
    if is_safetensors(head):
        return "a safetensors file, name it *.safetensors"
    for signature, words in SIGNATURES.items():
        if head.startswith(signature):
            return words
    if text.startswith((b"{", b"[")):
        return "a JSON text"
    return None


def is_safetensors(head: bytes) -> bool:
    """Whether a file begins as safetensors do: the length of a JSON object, then the object."""
    length = int.from_bytes(head[:8], "little")
    return len(head) > 9 and head[8:9] == b"{" and 2 <= length < 2**40 and b'"' in head[9:32]
