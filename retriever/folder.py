"""Folders that are either whole or absent: atomic publication, manifest, checksums.

A folder is written under a temporary name beside its target, every file is flushed, `manifest.json` is
written last with size and SHA-256 of every file, and one rename publishes it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retriever.errors import InputError

__all__ = [
    "MANIFEST",
    "check_folder",
    "publish_file",
    "publish_folder",
    "read_json",
    "read_manifest",
    "write_json",
]

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
UNCHECKED = frozenset({MANIFEST, "README.md"})  # a model card may be edited by hand
FAST_CHECK = 1 << 24  # bytes up to which a file's checksum is compared in the fast check; 10 ms


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        InputError: If the file is missing or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing. Give a folder that Endex wrote, or write it again.") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is not JSON: {error}. Restore the file or write the folder again."
        ) from None
    if not isinstance(value, dict):
        raise InputError(
            f"{path} must hold a JSON object, got {type(value).__name__}. Write the folder again."
        )
    return value


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def refuse_existing(target: Path) -> None:
    """Raise InputError if `target` exists already."""
    if target.exists():
        raise InputError(f"{target} exists already. Choose another folder, or add --overwrite to replace it.")


@contextmanager
def publish_folder(
    target: Path, kind: str, *, overwrite: bool = False, about: dict[str, Any] | None = None
) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` when the block ends without an error.

    Args:
        target: The folder to publish.
        kind: What the folder is (`"model"`, `"index"`, `"checkpoint"`); checked when it is read.
        overwrite: Replace an existing `target`. It stays in place until the new one is complete.
        about: Further entries of the manifest. The block may still add to it.

    Raises:
        InputError: If `target` exists and `overwrite` is false, or its disk is full.
    """
    if not overwrite:
        refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        _write_manifest(temporary, kind, about or {})
        _replace(temporary, target)
    except Exception as error:
        _refuse_full_disk(error, target)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def publish_file(target: Path) -> Iterator[Path]:
    """Yield the path of a temporary file that becomes `target` when the block ends without an error.

    Raises:
        InputError: If the disk is full.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    except Exception as error:
        _refuse_full_disk(error, target)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def read_manifest(folder: Path, *kinds: str) -> dict[str, Any]:
    """Return the manifest of a folder of one of the given kinds.

    Raises:
        InputError: If there is no manifest, or it is of another kind or of a newer format.
    """
    kind = kinds[0]
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder. Give the path of {_with_article(kind)} folder.")
    if not (folder / MANIFEST).is_file():
        raise InputError(
            f"{folder} has no {MANIFEST}, so it is not {_with_article(kind)} folder of Endex or was never finished. "
            f"Give another folder, or write this one again."
        )
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest.get("files"), dict):
        raise InputError(f"{folder / MANIFEST} lists no files. Restore it or write {folder} again.")
    if manifest.get("kind") not in kinds:
        raise InputError(
            f"{folder} is {_with_article(str(manifest.get('kind')))} folder, but {_with_article(kind)} folder "
            "is needed here."
        )
    if manifest.get("format_version", 0) > FORMAT_VERSION:
        raise InputError(
            f"{folder} has format {manifest['format_version']}, newer than this Endex reads ({FORMAT_VERSION}). "
            "Upgrade Endex: pip install -U endex."
        )
    return manifest


def check_folder(folder: Path, kind: str, *, full: bool = True) -> dict[str, Any]:
    """Return the manifest after comparing the files with it.

    Args:
        folder: The folder.
        kind: What it must be.
        full: Compare size and SHA-256 of every file; else the size of every file and the SHA-256 of those up to 16 MiB.

    Raises:
        InputError: If a file is missing, has another size or another checksum; the message names it.
    """
    manifest = read_manifest(folder, kind)
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path} is missing. Restore it from a copy or write {folder} again.")
        size = path.stat().st_size
        if size != entry["size"]:
            raise InputError(
                f"{path} has {size} bytes instead of {entry['size']}. Restore it from a copy or write {folder} again."
            )
        if (full or size <= FAST_CHECK) and _sha256(path) != entry["sha256"]:
            raise InputError(
                f"{path} is damaged: SHA-256 differs from {MANIFEST}. Restore it or write {folder} again."
            )
    return manifest


def _with_article(kind: str) -> str:
    return f"an {kind}" if kind[:1] in "aeiou" else f"a {kind}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_manifest(folder: Path, kind: str, about: dict[str, Any]) -> None:
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        name = path.relative_to(folder).as_posix()
        if name not in UNCHECKED:
            files[name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    manifest = folder / MANIFEST
    write_json(manifest, {"kind": kind, "format_version": FORMAT_VERSION, **about, "files": files})
    with manifest.open("rb") as file:
        os.fsync(file.fileno())


def _refuse_full_disk(error: Exception, target: Path) -> None:
    """Raise InputError if an error says that there is no room; FAISS and safetensors say so in words alone."""
    if any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
        raise InputError(
            f"{target} could not be written: {error}. What was there is unchanged. Make room, or write to another disk."
        ) from error


def _replace(temporary: Path, target: Path) -> None:
    """Rename `temporary` to `target`; an existing target is moved aside first and removed last."""
    if target.exists():
        old = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.old")
        target.rename(old)
        try:
            temporary.rename(target)
        except OSError:
            old.rename(target)
            raise
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    else:
        temporary.rename(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
