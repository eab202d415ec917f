"""A model folder gives back the model that was saved, or says which file is damaged."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, BertModel

from retriever import (
    Document,
    DualEncoder,
    DualEncoderConfig,
    InputError,
    TextPair,
    embed_documents,
    embed_queries,
    model_fingerprint,
)
from retriever.data import Collator
from retriever.heads import NoCompressionConfig, ProductQuantizerConfig, ResidualQuantizerConfig

HEAD = ProductQuantizerConfig(num_codebooks=4, codebook_bits=4)
QUERIES = ["w1 w2 w3", "w4", " ".join(f"w{i}" for i in range(40))]
DOCUMENTS = [
    Document("a", "w1", "w2 w3 w4"),
    Document("b", "", "w7"),
    Document("c", "w9", " ".join(f"w{i}" for i in range(50))),
]


def make_config(tiny_model: Path, **changes: object) -> DualEncoderConfig:
    config = DualEncoderConfig(
        encoder=str(tiny_model),
        query_max_length=16,
        document_max_length=32,
        query_prompt="w100 ",
        document_prompt="w101 w102 ",
        title_separator=" w103 ",
    )
    return replace(config, **changes)


def make_model(tiny_model: Path, **changes: object) -> DualEncoder:
    torch.manual_seed(0)
    return make_config(tiny_model, **changes).build(HEAD).eval()


def make_other_towers(model: DualEncoder) -> DualEncoder:
    """Move the weights of the document tower, so that untied towers differ."""
    with torch.no_grad():
        for parameter in model.document_encoder.parameters():
            parameter.add_(torch.full_like(parameter, 0.01))
    return model


def embed(model: DualEncoder) -> tuple[Tensor, Tensor, Tensor]:
    documents = embed_documents(model, DOCUMENTS)
    return embed_queries(model, QUERIES), documents, model.compress(documents)


@pytest.fixture(scope="module")
def saved(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tied model; copy it before changing it."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    make_model(tiny_model).save(folder, files={"README.md": "card", "experiment.yaml": "seed: 1"})
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


# --- saving and loading ---


@pytest.mark.parametrize("tie", [True, False])
def test_loaded_model_gives_identical_embeddings_and_codes(
    tiny_model: Path, tmp_path: Path, tie: bool
) -> None:
    model = make_model(tiny_model, tie=tie)
    if not tie:
        make_other_towers(model)
    model.save(tmp_path / "model")
    loaded = DualEncoder.load(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(embed(loaded), embed(model), strict=True))


@pytest.mark.parametrize("tie", [True, False])
def test_loaded_model_is_tied_as_the_saved_one(tiny_model: Path, tmp_path: Path, tie: bool) -> None:
    make_model(tiny_model, tie=tie).save(tmp_path / "model")
    assert DualEncoder.load(tmp_path / "model").tied is tie


@pytest.mark.parametrize("tie", [True, False])
def test_loaded_model_has_the_settings_of_both_towers(tiny_model: Path, tmp_path: Path, tie: bool) -> None:
    model = make_model(tiny_model, tie=tie)
    model.save(tmp_path / "model")
    loaded = DualEncoder.load(tmp_path / "model")
    assert loaded.query_encoder.settings == model.query_encoder.settings
    assert loaded.document_encoder.settings == model.document_encoder.settings


def test_loaded_model_has_the_title_separator(saved: Path) -> None:
    assert DualEncoder.load(saved).title_separator == " w103 "


def test_loaded_model_is_in_evaluation_mode(saved: Path) -> None:
    assert not any(module.training for module in DualEncoder.load(saved).modules())


def test_existing_folder_is_refused_and_left_as_it_is(tiny_model: Path, copied: Path) -> None:
    before = model_fingerprint(copied)
    with pytest.raises(InputError, match="exists already"):
        make_other_towers(make_model(tiny_model)).save(copied)
    assert model_fingerprint(copied) == before


def test_given_text_files_are_in_the_folder(saved: Path) -> None:
    assert (saved / "experiment.yaml").read_text() == "seed: 1"


def test_no_file_of_the_folder_is_a_pickle(saved: Path) -> None:
    suffixes = {path.suffix for path in saved.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".txt", ".md", ".yaml"}


# --- damage ---


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [remove, truncate, flip_a_byte])
@pytest.mark.parametrize(
    "name",
    [
        "encoder/model.safetensors",
        "encoder/tokenizer.json",
        "encoder/1_Pooling/config.json",
        "head/model.safetensors",
        "head/config.json",
        "dual_encoder.json",
    ],
)
def test_damaged_file_is_an_input_error_that_names_it(
    copied: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(copied / name)
    with pytest.raises(InputError, match=re.escape(str(copied / name))):
        DualEncoder.load(copied)


def test_edited_readme_is_no_damage(copied: Path) -> None:
    (copied / "README.md").write_text("better card", encoding="utf-8")
    DualEncoder.load(copied)


def test_removed_readme_is_no_damage(copied: Path) -> None:
    (copied / "README.md").unlink()
    DualEncoder.load(copied)


def test_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a model folder of Endex"):
        DualEncoder.load(tmp_path)


# --- fingerprint ---


def test_fingerprint_of_a_copy_is_equal(saved: Path, copied: Path) -> None:
    assert model_fingerprint(copied) == model_fingerprint(saved)


def test_fingerprint_of_the_model_saved_again_is_equal(saved: Path, tmp_path: Path) -> None:
    DualEncoder.load(saved).save(tmp_path / "again")
    assert model_fingerprint(tmp_path / "again") == model_fingerprint(saved)


def test_fingerprint_does_not_depend_on_readme_and_experiment(saved: Path, tmp_path: Path) -> None:
    files = {"README.md": "other card", "experiment.yaml": "seed: 2"}
    DualEncoder.load(saved).save(tmp_path / "again", files=files)
    assert model_fingerprint(tmp_path / "again") == model_fingerprint(saved)


@pytest.mark.parametrize("part", ["query_encoder", "head"])
def test_fingerprint_of_a_model_with_other_weights_differs(saved: Path, tmp_path: Path, part: str) -> None:
    model = DualEncoder.load(saved)
    with torch.no_grad():
        next(getattr(model, part).parameters()).view(-1)[0] += 1
    model.save(tmp_path / "other")
    assert model_fingerprint(tmp_path / "other") != model_fingerprint(saved)


def test_fingerprint_of_a_model_with_another_prompt_differs(
    tiny_model: Path, saved: Path, tmp_path: Path
) -> None:
    make_model(tiny_model, query_prompt="w99 ").save(tmp_path / "other")
    assert model_fingerprint(tmp_path / "other") != model_fingerprint(saved)


def test_fingerprint_of_a_damaged_model_is_refused(copied: Path) -> None:
    flip_a_byte(copied / "head" / "model.safetensors")
    with pytest.raises(InputError, match="is damaged"):
        model_fingerprint(copied)


# --- building ---


def test_tied_towers_share_their_weights(tiny_model: Path) -> None:
    model = make_model(tiny_model)
    assert model.query_encoder.backbone is model.document_encoder.backbone


def test_untied_towers_share_no_weight(tiny_model: Path) -> None:
    model = make_model(tiny_model, tie=False)
    query = {parameter.data_ptr() for parameter in model.query_encoder.parameters()}
    assert query.isdisjoint(parameter.data_ptr() for parameter in model.document_encoder.parameters())


def test_another_document_model_unties_the_towers(tiny_model: Path) -> None:
    assert not make_model(tiny_model, document_encoder=str(tiny_model), tie=True).tied


def test_towers_of_different_dimensions_are_refused_by_name(tiny_model: Path, tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=125,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(tmp_path / "narrow")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "narrow")
    message = rf"got 32 for queries \({tiny_model}\) and 16 for documents \({tmp_path / 'narrow'}\)"
    with pytest.raises(InputError, match=message):
        make_model(tiny_model, document_encoder=str(tmp_path / "narrow"))


def test_head_that_does_not_fit_the_towers_is_refused(tiny_model: Path) -> None:
    with pytest.raises(InputError, match=r"dim=32 and num_codebooks=5\. Try num_codebooks=4"):
        make_config(tiny_model).build(ProductQuantizerConfig(num_codebooks=5))


def test_l2_scores_of_vectors_that_are_not_normalized_are_refused(tiny_model: Path) -> None:
    config = make_config(tiny_model, normalize=False)
    with pytest.raises(InputError, match=r"metric l2 needs unit vectors.* Set metric inner_product, or"):
        config.build(replace(HEAD, metric="l2"))


def test_inner_products_of_vectors_that_are_not_normalized_are_allowed(tiny_model: Path) -> None:
    config = make_config(tiny_model, normalize=False)
    assert config.build(replace(HEAD, metric="inner_product")).head.metric == "inner_product"


# --- texts to vectors ---


@pytest.mark.parametrize(
    ("document", "text"),
    [(Document("a", "title", "text"), "title w103 text"), (Document("a", "", "text"), "text")],
)
def test_title_is_put_before_the_text_with_the_separator(
    tiny_model: Path, document: Document, text: str
) -> None:
    assert make_model(tiny_model).format_document(document) == text


def test_document_is_tokenized_with_its_prompt_title_and_separator(tiny_model: Path) -> None:
    model = make_model(tiny_model)
    ids = model.tokenize_documents([Document("a", "w1", "w2 w3")])["input_ids"]
    expected = model.document_encoder.tokenize(["w101 w102 w1 w103 w2 w3"])["input_ids"]
    assert torch.equal(ids, expected)


def test_query_is_tokenized_with_its_prompt(tiny_model: Path) -> None:
    model = make_model(tiny_model)
    expected = model.query_encoder.tokenize(["w100 w1 w2"])["input_ids"]
    assert torch.equal(model.tokenize_queries(["w1 w2"])["input_ids"], expected)


def test_query_and_document_are_cut_at_their_own_length(tiny_model: Path) -> None:
    model, text = make_model(tiny_model), " ".join(f"w{i}" for i in range(50))
    query = model.tokenize_queries([text])["input_ids"]
    document = model.tokenize_documents([Document("a", "", text)])["input_ids"]
    assert (query.shape, document.shape) == ((1, 16), (1, 32))


def test_a_model_in_training_compresses_like_the_finished_one(tiny_model: Path) -> None:
    model = make_config(tiny_model).build(
        ResidualQuantizerConfig(num_codebooks=4, codebook_bits=4, eval_beam=40)
    )
    x = torch.randn(200, model.dim, generator=torch.Generator().manual_seed(0))
    codes = model.train().compress(x)
    assert model.head.training
    assert not torch.equal(codes, model.head.encode(x))
    assert torch.equal(codes, model.eval().compress(x))


def test_embedded_documents_are_in_the_order_given(tiny_model: Path) -> None:
    model = make_model(tiny_model)
    alone = torch.cat([embed_documents(model, [document]) for document in DOCUMENTS])
    torch.testing.assert_close(embed_documents(model, DOCUMENTS), alone, rtol=0, atol=1e-5)


def test_embedded_queries_are_in_the_order_given(tiny_model: Path) -> None:
    model = make_model(tiny_model)
    alone = torch.cat([embed_queries(model, [query]) for query in QUERIES])
    torch.testing.assert_close(embed_queries(model, QUERIES), alone, rtol=0, atol=1e-5)


def test_embeddings_do_not_depend_on_the_batch_size(tiny_model: Path) -> None:
    model = make_model(tiny_model)
    vectors = [embed_documents(model, DOCUMENTS, batch_size=size) for size in (1, 2, 3)]
    torch.testing.assert_close(vectors[0], vectors[2], rtol=0, atol=1e-5)
    torch.testing.assert_close(vectors[1], vectors[2], rtol=0, atol=1e-5)


def test_embedding_leaves_the_model_in_its_mode(tiny_model: Path) -> None:
    model = make_model(tiny_model).train()
    embed_queries(model, QUERIES)
    assert model.training


def test_embedding_in_training_mode_has_no_dropout(tiny_model: Path) -> None:
    model = make_model(tiny_model)
    expected = embed_queries(model, QUERIES)
    assert torch.equal(embed_queries(model.train(), QUERIES), expected)


def test_unknown_precision_is_refused(tiny_model: Path) -> None:
    with pytest.raises(InputError, match=r"precision must be one of fp32, bf16, fp16, got 'int8'"):
        embed_queries(make_model(tiny_model), QUERIES, precision="int8")


def test_bfloat16_embeddings_are_near_the_float32_ones(tiny_model: Path) -> None:
    model = make_model(tiny_model)
    cosine = (embed_queries(model, QUERIES, precision="bf16") * embed_queries(model, QUERIES)).sum(1)
    assert cosine.min() > 0.999


def make_batch(model: DualEncoder) -> object:
    pairs = [
        TextPair(query=query, positive=document, negatives=(Document("n", "", "w50"),))
        for query, document in zip(QUERIES, DOCUMENTS, strict=True)
    ]
    return Collator(model.tokenize_queries, model.tokenize_documents)(pairs)


def test_forward_returns_the_vectors_of_embedding(tiny_model: Path) -> None:
    model = make_model(tiny_model)
    embeddings = model(make_batch(model))
    torch.testing.assert_close(embeddings.queries, embed_queries(model, QUERIES), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        embeddings.documents[::2], embed_documents(model, DOCUMENTS), rtol=0, atol=1e-5
    )


def test_forward_with_compression_returns_the_head_s_reconstruction(tiny_model: Path) -> None:
    model = make_model(tiny_model)
    embeddings = model(make_batch(model))
    expected = model.head.decode(model.head.encode(embeddings.documents))
    torch.testing.assert_close(embeddings.compressed.reconstruction, expected, rtol=0, atol=1e-5)


def test_forward_without_compression_returns_the_vectors_themselves(tiny_model: Path) -> None:
    model = make_model(tiny_model)
    embeddings = model(make_batch(model), compress=False)
    assert torch.equal(embeddings.compressed.reconstruction, embeddings.documents)


def test_uncompressed_model_is_saved_and_loaded(tiny_model: Path, tmp_path: Path) -> None:
    model = make_config(tiny_model).build(NoCompressionConfig()).eval()
    model.save(tmp_path / "model")
    assert torch.equal(
        embed_queries(DualEncoder.load(tmp_path / "model"), QUERIES), embed_queries(model, QUERIES)
    )
