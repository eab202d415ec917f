"""Encoding by shards, with interruptions, and merging give byte for byte the index of one export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from index import (
    FaissFit,
    IndexConfig,
    Searcher,
    Shard,
    estimate_export,
    export_index,
    export_shard,
    merge_indexes,
)
from index.lines import Lines
from retriever import Document, DualEncoderConfig, InputError, embed_documents, read_corpus
from retriever.beir import count_documents
from retriever.heads import HeadConfig, IVFProductQuantizerConfig, NoCompressionConfig, ProductQuantizerConfig
from retriever.id_set import IdSet

PQ = ProductQuantizerConfig(num_codebooks=4, codebook_bits=4)
HEADS: dict[str, HeadConfig] = {
    "pq": PQ,
    "ivfpq": IVFProductQuantizerConfig(num_codebooks=4, codebook_bits=4, num_lists=8),
}
BLOCK = 16  # of 80 documents, so 5 blocks
NAMES = ("index", "codes.u8", "docid", "documents.jsonl", "documents.offsets")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("index.encode.BLOCK", BLOCK)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(threads)


@pytest.fixture(scope="module")
def documents(tiny_data: Path) -> list[Document]:
    return list(read_corpus(tiny_data))


def save_model(
    folder: Path, tiny_model: Path, documents: list[Document], head: HeadConfig, seed: int
) -> Path:
    torch.manual_seed(seed)
    model = DualEncoderConfig(encoder=str(tiny_model), document_max_length=32).build(head).eval()
    model.head.warm_start(embed_documents(model, documents), FaissFit(), seed)
    model.save(folder, files={"experiment.yaml": "seed: 1"})
    return folder


@pytest.fixture(scope="module")
def models(
    tiny_model: Path, documents: list[Document], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_model(root / name, tiny_model, documents, head, 0) for name, head in HEADS.items()}


def shard(
    model: Path, documents: list[Document], out: Path, number: int, count: int, **options: object
) -> Path:
    part = Shard(number, count)
    start, stop = part.rows(len(documents))
    rows = documents[start:stop]
    options = {"device": "cpu", "progress": False} | options
    export_shard(model, iter(rows), out, shard=part, total=len(documents), **options)
    return out


def export(model: Path, documents: object, out: Path, **options: object) -> Path:
    options = {"config": IndexConfig(), "device": "cpu", "progress": False} | options
    export_index(model, documents, out, **options)
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in NAMES}


# --- shards ---


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("head", HEADS)
def test_merged_shards_are_byte_for_byte_one_export(
    models: dict[str, Path], documents: list[Document], tmp_path: Path, head: str, count: int
) -> None:
    whole = export(models[head], documents, tmp_path / "whole")
    parts = [
        shard(models[head], documents, tmp_path / str(number), number, count)
        for number in range(1, count + 1)
    ]
    merge_indexes(parts[::-1], tmp_path / "merged")  # their order is that of their numbers
    assert content(tmp_path / "merged") == content(whole)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_bytes_do_not_depend_on_the_batch_size(
    models: dict[str, Path], documents: list[Document], tmp_path: Path, batch_size: int
) -> None:
    whole = export(models["pq"], documents, tmp_path / "whole")
    other = export(models["pq"], documents, tmp_path / "other", batch_size=batch_size)
    assert content(other) == content(whole)
    assert (other / "sample.safetensors").read_bytes() == (whole / "sample.safetensors").read_bytes()


@pytest.mark.parametrize(("total", "count"), [(80, 5), (81, 6), (1, 1), (1000, 7)])
def test_shards_cover_every_row_once(total: int, count: int) -> None:
    rows = [Shard(number, count).rows(total) for number in range(1, count + 1)]
    assert [row for start, stop in rows for row in range(start, stop)] == list(range(total))
    assert all(start % BLOCK == 0 and start < stop for start, stop in rows)


def test_more_shards_than_blocks_are_refused() -> None:
    with pytest.raises(InputError, match="80 documents make 5 blocks of 16, too few for 6 shards"):
        Shard(1, 6).rows(80)


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/", "-1/2"])
def test_faulty_shard_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="a shard is I/N"):
        Shard.parse(text)


def test_shard_of_a_corpus_that_changed_is_refused(
    models: dict[str, Path], documents: list[Document], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="has rows 0 to 48, but 47 documents came"):
        export_shard(
            models["pq"],
            documents[:47],
            tmp_path / "s",
            shard=Shard(1, 1),
            total=48,
            progress=False,
            device="cpu",
        )
    assert not (tmp_path / "s").exists()


# --- interruptions ---


class Killed(BaseException):
    """Stands for a signal: nothing catches it."""


def until(documents: list[Document], count: int) -> Iterator[Document]:
    yield from documents[:count]
    raise Killed


@pytest.mark.parametrize("stops", [[16], [17, 40], [1, 79, 80], [33, 33, 65]])
def test_interrupted_export_goes_on_and_ends_with_the_same_bytes(
    models: dict[str, Path], documents: list[Document], tmp_path: Path, stops: list[int]
) -> None:
    whole = export(models["pq"], documents, tmp_path / "whole")
    for stop in stops:
        with pytest.raises(Killed):
            export(models["pq"], until(documents, stop), tmp_path / "index")
        assert not (tmp_path / "index").exists()
    assert content(export(models["pq"], documents, tmp_path / "index")) == content(whole)
    assert not (tmp_path / "index.part").exists()


def test_blocks_are_not_encoded_twice(
    models: dict[str, Path], documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Killed):
        export(models["pq"], until(documents, 40), tmp_path / "index")
    encoded: list[str] = []

    def embed(model: object, block: list[Document], **options: object) -> torch.Tensor:
        encoded.extend(document.id for document in block)
        return embed_documents(model, block, **options)

    monkeypatch.setattr("index.encode.embed_documents", embed)
    export(models["pq"], documents, tmp_path / "index")
    assert encoded == [document.id for document in documents[32:]]


def test_half_written_block_is_cut_off(
    models: dict[str, Path], documents: list[Document], tmp_path: Path
) -> None:
    whole = export(models["pq"], documents, tmp_path / "whole")
    with pytest.raises(Killed):
        export(models["pq"], until(documents, 40), tmp_path / "index")
    for name in ("codes.u8", "docid", "documents.jsonl", "documents.offsets"):
        with (tmp_path / "index.part" / name).open("ab") as file:
            file.write(b"half a bl")
    assert content(export(models["pq"], documents, tmp_path / "index")) == content(whole)


@pytest.mark.parametrize(
    "change",
    [
        lambda documents: documents[1:],
        lambda documents: [Document("d0", "another", "text"), *documents[1:]],
        lambda documents: documents[:20],
    ],
)
def test_going_on_with_another_corpus_is_refused(
    models: dict[str, Path],
    documents: list[Document],
    tmp_path: Path,
    change: Callable[[list[Document]], list[Document]],
) -> None:
    with pytest.raises(Killed):
        export(models["pq"], until(documents, 40), tmp_path / "index")
    with pytest.raises(InputError, match="the corpus is not the one whose first 32 documents are in"):
        export(models["pq"], change(documents), tmp_path / "index")


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"store_texts": False}])
def test_going_on_in_another_way_is_refused(
    models: dict[str, Path], documents: list[Document], tmp_path: Path, options: dict[str, object]
) -> None:
    with pytest.raises(Killed):
        export(models["pq"], until(documents, 40), tmp_path / "index")
    with pytest.raises(InputError, match=f"beginning of another encoding: its {next(iter(options))} is"):
        export(models["pq"], documents, tmp_path / "index", **options)


def test_two_writers_are_refused(models: dict[str, Path], documents: list[Document], tmp_path: Path) -> None:
    def second() -> Iterator[Document]:
        with pytest.raises(InputError, match="another process is writing"):
            export(models["pq"], documents, tmp_path / "index")
        yield from documents

    export(models["pq"], second(), tmp_path / "index")


def test_failure_of_the_build_keeps_the_codes(
    models: dict[str, Path], documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = export(models["pq"], documents, tmp_path / "whole")

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("index.artifact.prove_parity", fail)
        with pytest.raises(MemoryError):
            export(models["pq"], documents, tmp_path / "index")
        monkeypatch.setattr("index.encode.embed_documents", fail)  # nothing is left to encode
    assert content(export(models["pq"], documents, tmp_path / "index")) == content(whole)


# --- merging ---


def test_documents_are_added(models: dict[str, Path], documents: list[Document], tmp_path: Path) -> None:
    whole = export(models["ivfpq"], documents, tmp_path / "whole")
    old = export(models["ivfpq"], documents[:32], tmp_path / "old")
    new = shard(models["ivfpq"], documents[32:], tmp_path / "new", 1, 1)
    merge_indexes([old, new], tmp_path / "merged")
    assert content(tmp_path / "merged") == content(whole)


def test_documents_are_removed(models: dict[str, Path], documents: list[Document], tmp_path: Path) -> None:
    gone = {documents[row].id for row in (0, 5, 16, 79)}
    kept = export(models["pq"], [d for d in documents if d.id not in gone], tmp_path / "kept")
    whole = export(models["pq"], documents, tmp_path / "whole")
    merge_indexes([whole], tmp_path / "merged", remove=gone)
    merged, wanted = content(tmp_path / "merged"), content(kept)
    # the other documents were encoded in other company, which changes the last bits of a vector, seldom a code
    assert {name: merged[name] for name in NAMES[2:]} == {name: wanted[name] for name in NAMES[2:]}
    codes = np.fromfile(whole / "codes.u8", np.uint8).reshape(len(documents), -1)
    assert merged["codes.u8"] == np.delete(codes, [0, 5, 16, 79], axis=0).tobytes()
    assert not gone & set(Searcher(tmp_path / "merged").search(["w1 w2 w3"], 76)[1][0])


@pytest.mark.parametrize("sorted_ids", [7, 80, 1000])
def test_documents_are_replaced(
    models: dict[str, Path],
    documents: list[Document],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sorted_ids: int,
) -> None:
    monkeypatch.setattr("index.merge.SORTED_IDS", sorted_ids)
    old = export(models["pq"], documents, tmp_path / "old")
    changed = [Document(documents[row].id, "new", "w7 w8") for row in (3, 40)]
    new = shard(models["pq"], changed, tmp_path / "new", 1, 1)
    with pytest.raises(InputError, match=r"the document id 'd3' is in .*old and in .*new"):
        merge_indexes([old, new], tmp_path / "merged")
    merge_indexes([old, new], tmp_path / "merged", update=True)
    searcher = Searcher(tmp_path / "merged")
    names = [document.id for document in documents if document.id not in ("d3", "d40")]
    assert list(searcher.document_ids) == [*names, "d3", "d40"]
    assert searcher.document(79) == changed[1]


def test_index_gets_another_form(models: dict[str, Path], documents: list[Document], tmp_path: Path) -> None:
    form = IndexConfig(kind="ivfpq", nlist=4)
    whole = export(models["pq"], documents, tmp_path / "whole", config=form)
    plain = export(models["pq"], documents, tmp_path / "plain")
    merge_indexes([plain], tmp_path / "merged", config=form)
    assert content(tmp_path / "merged") == content(whole)


@pytest.mark.parametrize("piece", [1, 7, 32, 1000])
@pytest.mark.parametrize("head", HEADS)
def test_lists_on_disk_give_the_same_hits(
    models: dict[str, Path],
    documents: list[Document],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    head: str,
    piece: int,
) -> None:
    monkeypatch.setattr("index.on_disk.PIECE", piece)
    monkeypatch.setattr("index.builders.lists.PROBED", 50)  # 5 of 8 lists
    whole = export(models[head], documents, tmp_path / "whole", config=IndexConfig(kind="ivfpq"))
    disk = tmp_path / "disk"
    merge_indexes([whole], disk, config=IndexConfig(kind="ivfpq", on_disk=True))
    assert (disk / "index").stat().st_size + (disk / "index.ivfdata").stat().st_size > 80 * 8
    moved = disk.rename(tmp_path / "moved")  # the path is in the file, and must not matter
    queries = [document.text for document in documents[:20]]
    searcher = Searcher(moved, verify=True)
    for nprobe in (None,) if head == "pq" else (None, 1, 3, 8):
        scores, ids = searcher.search(queries, 30, nprobe=nprobe)
        expected, names = Searcher(whole).search(queries, 30, nprobe=nprobe)
        np.testing.assert_array_equal(scores, expected)
        assert ids == names
    few = searcher.search(queries, 30, ids=["d3", "d70"])
    assert {name for row in few[1] for name in row} <= {"d3", "d70"}
    merge_indexes([moved], tmp_path / "again", config=IndexConfig(kind="ivfpq"))
    assert content(tmp_path / "again") == content(whole)


def test_lists_on_disk_need_lists() -> None:
    with pytest.raises(InputError, match=r"index\.on_disk=True needs index\.kind ivfpq, got 'pq'"):
        IndexConfig(kind="pq", on_disk=True)


def test_index_is_merged_over_itself(
    models: dict[str, Path], documents: list[Document], tmp_path: Path
) -> None:
    old = export(models["pq"], documents, tmp_path / "old")
    merge_indexes([old], old, remove=["d0"], overwrite=True)
    assert len(Searcher(old, verify=True).document_ids) == 79


def test_shards_of_different_models_are_refused(
    models: dict[str, Path], tiny_model: Path, documents: list[Document], tmp_path: Path
) -> None:
    other = save_model(tmp_path / "model", tiny_model, documents, PQ, 1)
    first = shard(models["pq"], documents, tmp_path / "1", 1, 2)
    second = shard(other, documents, tmp_path / "2", 2, 2)
    with pytest.raises(InputError, match="was made with another model than"):
        merge_indexes([first, second], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_incomplete_sets_are_refused(
    models: dict[str, Path], documents: list[Document], tmp_path: Path
) -> None:
    parts = [shard(models["pq"], documents, tmp_path / str(number), number, 3) for number in (1, 2, 3)]
    alone = shard(models["pq"], documents, tmp_path / "alone", 1, 2)
    cases = [
        ([], "there is nothing to merge"),
        (parts[:2], r"shard 3/3 is missing \(1 of 3 are\)"),
        ([parts[0], *parts], "shard 1/3 comes twice"),
        ([*parts, alone], "the shards are of different sets: 1/2 of 80 documents and 1/3 of 80 documents"),
    ]
    for folders, fault in cases:
        with pytest.raises(InputError, match=fault):
            merge_indexes(folders, tmp_path / "merged")


def test_other_faults_are_refused(models: dict[str, Path], documents: list[Document], tmp_path: Path) -> None:
    index = export(models["pq"], documents[:40], tmp_path / "index")
    without = export(models["pq"], documents[40:], tmp_path / "without", store_texts=False)
    with pytest.raises(InputError, match=r"only one of .* stores texts"):
        merge_indexes([index, without], tmp_path / "merged")
    with pytest.raises(InputError, match="1 ids to remove are not there, for example 'd79'"):
        merge_indexes([index], tmp_path / "merged", remove=["d1", "d79"])
    with pytest.raises(InputError, match="no document is left"):
        merge_indexes([index], tmp_path / "merged", remove=[d.id for d in documents[:40]])
    with pytest.raises(InputError, match="is not a folder"):
        merge_indexes([tmp_path / "nowhere"], tmp_path / "merged")
    with pytest.raises(InputError, match="is a model folder, but an index folder is needed"):
        merge_indexes([models["pq"]], tmp_path / "merged")


def test_damaged_shard_is_named(models: dict[str, Path], documents: list[Document], tmp_path: Path) -> None:
    first = shard(models["pq"], documents, tmp_path / "1", 1, 1)
    codes = bytearray((first / "codes.u8").read_bytes())
    codes[7] ^= 1
    (first / "codes.u8").write_bytes(codes)
    with pytest.raises(InputError, match=r"codes\.u8 is damaged"):
        merge_indexes([first], tmp_path / "merged")


def test_uncompressed_vectors_are_merged_from_shards(
    tiny_model: Path, documents: list[Document], tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model", tiny_model, documents, NoCompressionConfig(), 0)
    whole = export(model, documents, tmp_path / "whole")
    parts = [shard(model, documents, tmp_path / str(number), number, 2) for number in (1, 2)]
    merge_indexes(parts, tmp_path / "merged")
    assert (tmp_path / "merged" / "index").read_bytes() == (whole / "index").read_bytes()
    with pytest.raises(InputError, match="holds no codes"):
        merge_indexes([whole], tmp_path / "again")


# --- what it takes ---


def test_estimate_is_near_what_comes(
    models: dict[str, Path], documents: list[Document], tmp_path: Path
) -> None:
    estimate = estimate_export(
        models["pq"], iter(documents), total=80, config=IndexConfig(), sample=40, device="cpu"
    )
    out = export(models["pq"], documents, tmp_path / "index")
    assert estimate.documents == 80
    assert estimate.code_bytes == (out / "codes.u8").stat().st_size
    assert estimate.index_bytes == pytest.approx((out / "index").stat().st_size, abs=8)
    texts = sum((out / name).stat().st_size for name in ("documents.jsonl", "documents.offsets"))
    assert estimate.text_bytes == pytest.approx(texts, rel=0.1)
    assert estimate.seconds > 0
    assert estimate.memory_bytes > 1e8  # torch is loaded


# --- parts ---


@pytest.mark.parametrize("end", ["\n", ""])
def test_lines_are_those_of_the_file(tmp_path: Path, end: str) -> None:
    lines = ["a", "", "ß\u2028x", "d" * 1000, "z"]
    (tmp_path / "lines").write_bytes(("\n".join(lines) + end).encode())
    found = Lines(tmp_path / "lines")
    assert (list(found), len(found), found[-1], found[1:3]) == (lines, 5, "z", lines[1:3])
    with pytest.raises(IndexError):
        found[5]


def test_lines_of_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "lines").touch()
    assert list(Lines(tmp_path / "lines")) == []


def test_id_set_knows_what_was_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retriever.id_set.RECENT_IDS", 7)
    known = IdSet()
    assert all(known.add(f"d{row}") for row in range(1000))
    assert not any(known.add(f"d{row}") for row in range(1000))
    assert len(known) == 1000


def test_two_ids_of_one_hash_are_two_documents(
    tiny_data: Path, documents: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retriever.id_set.IdSet.add", lambda *_: False)
    assert list(read_corpus(tiny_data)) == documents


def test_ranges_of_a_corpus(tiny_data: Path, documents: list[Document], tmp_path: Path) -> None:
    assert list(read_corpus(tiny_data, 20, 33)) == documents[20:33]
    assert list(read_corpus(tiny_data, 70)) == documents[70:]
    assert count_documents(tiny_data) == 80
    (tmp_path / "corpus.jsonl").write_text('{"_id": "a", "text": "x"}\n\n \n{"_id": "b", "text": "y"}\n')
    assert count_documents(tmp_path / "corpus.jsonl") == 2
    assert [d.id for d in read_corpus(tmp_path / "corpus.jsonl", 1)] == ["b"]
    shutil.copy(tmp_path / "corpus.jsonl", tmp_path / "empty.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no documents"):
        count_documents(tmp_path / "empty.jsonl")


def test_manifest_of_a_shard_says_its_place(
    models: dict[str, Path], documents: list[Document], tmp_path: Path
) -> None:
    manifest = json.loads(
        (shard(models["pq"], documents, tmp_path / "s", 2, 2) / "manifest.json").read_text()
    )
    assert (manifest["kind"], manifest["shard"], manifest["documents"]) == ("shard", "2/2", 80)
    assert not (tmp_path / "s" / "encoder").exists()  # shard 1 brings the model
