"""A published folder is whole or absent, and damage is named."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pytest

from retriever import InputError
from retriever.folder import (
    check_folder,
    publish_file,
    publish_folder,
    read_json,
    read_manifest,
    refuse_existing,
    write_json,
)


def publish(target: Path, text: str, *, overwrite: bool = False, kind: str = "model") -> None:
    with publish_folder(target, kind, overwrite=overwrite) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "a.txt").write_text(text, encoding="utf-8")
        (folder / "b.bin").write_bytes(b"\0\1\2")


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder by its relative name, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fail_inside(target: Path, error: BaseException, *, overwrite: bool) -> None:
    with publish_folder(target, "model", overwrite=overwrite) as folder:
        (folder / "half.txt").write_text("half", encoding="utf-8")
        raise error


def fill_disk(target: Path, publication: str, writer: str) -> None:
    index = faiss.IndexFlatL2(64)
    index.add(np.ones((1000, 64), np.float32))
    whole = publication == "folder"
    with publish_folder(target, "model", overwrite=True) if whole else publish_file(target) as place:
        full = place / "full" if whole else place
        full.symlink_to("/dev/full")
        faiss.write_index(index, str(full)) if writer == "faiss" else full.write_bytes(bytes(100_000))


# --- publication ---


def test_published_folder_holds_what_was_written_and_a_manifest(tmp_path: Path) -> None:
    publish(tmp_path / "out", "new")
    assert set(snapshot(tmp_path)) == {"out/part/a.txt", "out/b.bin", "out/manifest.json"}


def test_folder_is_absent_while_it_is_written(tmp_path: Path) -> None:
    with publish_folder(tmp_path / "out", "model"):
        assert not (tmp_path / "out").exists()


def test_missing_parents_of_the_folder_are_made(tmp_path: Path) -> None:
    publish(tmp_path / "a" / "b" / "out", "new")
    assert (tmp_path / "a" / "b" / "out" / "manifest.json").is_file()


def test_manifest_has_size_and_sha256_of_every_file(tmp_path: Path) -> None:
    publish(tmp_path / "out", "new")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["files"] == {
        "b.bin": {"size": 3, "sha256": hashlib.sha256(b"\0\1\2").hexdigest()},
        "part/a.txt": {"size": 3, "sha256": hashlib.sha256(b"new").hexdigest()},
    }


def test_entries_added_inside_the_block_are_in_the_manifest(tmp_path: Path) -> None:
    about: dict[str, object] = {"first": 1}
    with publish_folder(tmp_path / "out", "model", about=about):
        about["second"] = 2
    manifest = read_manifest(tmp_path / "out", "model")
    assert (manifest["first"], manifest["second"]) == (1, 2)


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_error_inside_the_block_leaves_nothing_behind(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        fail_inside(tmp_path / "out", error, overwrite=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_error_inside_the_block_leaves_an_existing_folder_untouched(
    tmp_path: Path, error: BaseException
) -> None:
    publish(tmp_path / "out", "old")
    before = snapshot(tmp_path)
    with pytest.raises(type(error)):
        fail_inside(tmp_path / "out", error, overwrite=True)
    assert snapshot(tmp_path) == before


def test_error_inside_the_block_leaves_no_hidden_folder_beside_an_existing_one(tmp_path: Path) -> None:
    publish(tmp_path / "out", "old")
    with pytest.raises(RuntimeError):
        fail_inside(tmp_path / "out", RuntimeError(), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_existing_folder_is_refused_without_overwrite(tmp_path: Path) -> None:
    publish(tmp_path / "out", "old")
    with pytest.raises(InputError, match=r"out exists already\. Choose another folder, or add --overwrite"):
        publish(tmp_path / "out", "new")


def test_refused_folder_is_untouched(tmp_path: Path) -> None:
    publish(tmp_path / "out", "old")
    before = snapshot(tmp_path)
    with pytest.raises(InputError):
        publish(tmp_path / "out", "new")
    assert snapshot(tmp_path) == before


def test_existing_folder_stays_whole_until_the_new_one_is_complete(tmp_path: Path) -> None:
    publish(tmp_path / "out", "old")
    with publish_folder(tmp_path / "out", "model", overwrite=True) as folder:
        (folder / "c.txt").write_text("new", encoding="utf-8")
        check_folder(tmp_path / "out", "model")


@pytest.mark.parametrize("is_file", [False, True])
def test_overwriting_replaces_everything(tmp_path: Path, is_file: bool) -> None:
    target = tmp_path / "out"
    if is_file:
        target.write_text("old", encoding="utf-8")
    else:
        target.mkdir()
        (target / "old.txt").write_text("old", encoding="utf-8")
    publish(target, "new", overwrite=True)
    assert set(snapshot(tmp_path)) == {"out/part/a.txt", "out/b.bin", "out/manifest.json"}


def test_existing_folder_survives_a_failure_of_the_last_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path / "out", "old")
    before = snapshot(tmp_path)
    rename = Path.rename

    def fail_for_the_new_folder(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError("the disk is gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_folder)
    with pytest.raises(OSError, match="the disk is gone"):
        publish(tmp_path / "out", "new", overwrite=True)
    assert snapshot(tmp_path) == before


def test_free_name_is_not_refused(tmp_path: Path) -> None:
    refuse_existing(tmp_path / "free")


# --- checks ---


def test_undamaged_folder_passes_the_check(tmp_path: Path) -> None:
    publish(tmp_path / "out", "new")
    assert check_folder(tmp_path / "out", "model")["kind"] == "model"


def damage_none(path: Path) -> None:
    path.unlink()


def damage_length(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [(damage_none, "is missing"), (damage_length, "has 2 bytes instead of 3"), (damage_byte, "is damaged")],
)
@pytest.mark.parametrize("name", ["part/a.txt", "b.bin"])
def test_damaged_file_is_named_with_its_damage(
    tmp_path: Path, name: str, damage: Callable[[Path], None], message: str
) -> None:
    publish(tmp_path / "out", "new")
    damage(tmp_path / "out" / name)
    with pytest.raises(InputError, match=rf"{re.escape(str(tmp_path / 'out' / name))} {message}"):
        check_folder(tmp_path / "out", "model")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
@pytest.mark.parametrize("writer", ["bytes", "faiss"])
@pytest.mark.parametrize("publication", ["folder", "file"])
def test_a_full_disk_is_named_and_leaves_what_was_there(
    tmp_path: Path, publication: str, writer: str
) -> None:
    target = tmp_path / "out"
    publish(target, "old")
    if publication == "file":
        target = target / "b.bin"
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=rf"{re.escape(str(target))} could not be written: .*No space left"):
        fill_disk(target, publication, writer)
    assert snapshot(tmp_path) == before


def test_an_error_that_is_not_of_the_disk_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^broken$"), publish_folder(tmp_path / "out", "model"):
        raise RuntimeError("broken")


def test_readme_may_be_edited(tmp_path: Path) -> None:
    with publish_folder(tmp_path / "out", "model") as folder:
        (folder / "README.md").write_text("card", encoding="utf-8")
    (tmp_path / "out" / "README.md").write_text("better card", encoding="utf-8")
    check_folder(tmp_path / "out", "model")


@pytest.mark.parametrize(
    ("kind", "needed", "message"),
    [
        ("index", "model", "is an index folder, but a model folder is needed here"),
        ("model", "index", "is a model folder, but an index folder is needed here"),
        ("checkpoint", "model", "is a checkpoint folder, but a model folder is needed here"),
    ],
)
def test_folder_of_another_kind_is_named(tmp_path: Path, kind: str, needed: str, message: str) -> None:
    publish(tmp_path / "out", "new", kind=kind)
    with pytest.raises(InputError, match=message):
        read_manifest(tmp_path / "out", needed)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing is not a folder\. Give the path of an index folder"):
        read_manifest(tmp_path / "nothing", "index")


def test_folder_without_a_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no manifest\.json, so it is not a model folder"):
        read_manifest(tmp_path, "model")


def test_folder_of_a_newer_format_asks_for_an_upgrade(tmp_path: Path) -> None:
    publish(tmp_path / "out", "new")
    path = tmp_path / "out" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    with pytest.raises(InputError, match=r"has format 2, newer than this Endex reads \(1\)\. Upgrade"):
        read_manifest(tmp_path / "out", "model")


def test_manifest_without_its_file_list_is_an_input_error(tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", {"kind": "model", "format_version": 1})
    with pytest.raises(InputError, match=r"manifest\.json"):
        check_folder(tmp_path, "model")


# --- JSON ---


def test_written_json_reads_the_same(tmp_path: Path) -> None:
    value = {"text": "Größe ☃", "number": 0.1, "nothing": None}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1]", "must hold a JSON object, got list"),
    ],
)
def test_faulty_json_file_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.json {message}"):
        read_json(tmp_path / "a.json")
