"""An encoder's folder is a sentence-transformers model with the same vectors, and the other way round."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

from retriever import DualEncoder, DualEncoderConfig, Encoder, InputError
from retriever.heads import ProductQuantizerConfig

POOLINGS = ("cls", "mean", "last")
ST_NAMES = {"cls": "cls", "mean": "mean", "last": "lasttoken"}
TEXTS = ["w1", "w2 w3 w4", " ".join(f"w{i}" for i in range(60)), "W5 unknown w6, w7."]
PROMPTS = {"query": "w100 w101 ", "document": "w102: "}

every_pooling = pytest.mark.parametrize("pooling", POOLINGS)
every_normalize = pytest.mark.parametrize("normalize", [True, False], ids=["unit", "free"])


def ours(encoder: Encoder, prompt: str = "") -> np.ndarray:
    with torch.no_grad():
        return encoder.eval()(encoder.tokenize(TEXTS, prompt)).numpy()


def theirs(model: SentenceTransformer, **options: str) -> np.ndarray:
    return model.encode(TEXTS, batch_size=len(TEXTS), show_progress_bar=False, **options)


def load_st(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


def make_st(
    tiny_model: Path,
    *,
    pooling: str = "mean",
    normalize: bool = True,
    max_seq_length: int | None = None,
    include_prompt: bool = True,
    prompts: dict[str, str] | None = None,
) -> SentenceTransformer:
    transformer = Transformer(str(tiny_model), max_seq_length=max_seq_length)
    modules = [transformer, Pooling(32, ST_NAMES[pooling], include_prompt=include_prompt)]
    return SentenceTransformer(
        modules=[*modules, *([Normalize()] if normalize else [])], prompts=prompts, device="cpu"
    )


def max_difference(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first.astype(np.float64) - second.astype(np.float64)).max())


# --- Encoder -> SentenceTransformer ---


@every_normalize
@every_pooling
@pytest.mark.parametrize("side", PROMPTS)
def test_sentence_transformers_gives_the_vectors_of_a_saved_encoder(
    tiny_model: Path, tmp_path: Path, side: str, pooling: str, normalize: bool
) -> None:
    encoder = Encoder.load(
        tiny_model,
        pooling=pooling,
        normalize=normalize,
        max_length=20,
        query_prompt=PROMPTS["query"],
        document_prompt=PROMPTS["document"],
    )
    encoder.save(tmp_path / "model")
    vectors = theirs(load_st(tmp_path / "model"), prompt_name=side)
    assert max_difference(vectors, ours(encoder, PROMPTS[side])) == 0.0


def test_encode_query_and_encode_document_use_the_saved_prompts(tiny_model: Path, tmp_path: Path) -> None:
    encoder = Encoder.load(
        tiny_model, query_prompt=PROMPTS["query"], document_prompt=PROMPTS["document"], max_length=20
    )
    encoder.save(tmp_path / "model")
    model = load_st(tmp_path / "model")
    queries = model.encode_query(TEXTS, batch_size=4, show_progress_bar=False)
    documents = model.encode_document(TEXTS, batch_size=4, show_progress_bar=False)
    assert max_difference(queries, ours(encoder, PROMPTS["query"])) == 0.0
    assert max_difference(documents, ours(encoder, PROMPTS["document"])) == 0.0


def test_sentence_transformers_reads_the_saved_prompts(tiny_model: Path, tmp_path: Path) -> None:
    Encoder.load(tiny_model, query_prompt=PROMPTS["query"], document_prompt=PROMPTS["document"]).save(
        tmp_path / "model"
    )
    assert load_st(tmp_path / "model").prompts == PROMPTS


@pytest.mark.parametrize("max_length", [7, 20, 64])
def test_sentence_transformers_reads_the_saved_length(
    tiny_model: Path, tmp_path: Path, max_length: int
) -> None:
    Encoder.load(tiny_model, max_length=max_length).save(tmp_path / "model")
    assert load_st(tmp_path / "model").max_seq_length == max_length


@pytest.mark.parametrize(("normalize", "similarity"), [(True, "cosine"), (False, "dot")])
def test_similarity_is_the_score_of_the_model(
    tiny_model: Path, tmp_path: Path, normalize: bool, similarity: str
) -> None:
    Encoder.load(tiny_model, normalize=normalize).save(tmp_path / "model")
    assert load_st(tmp_path / "model").similarity_fn_name == similarity


def test_tower_in_a_model_folder_is_a_sentence_transformers_model(tiny_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = DualEncoderConfig(encoder=str(tiny_model), document_prompt="w102: ", document_max_length=20)
    model = config.build(ProductQuantizerConfig(num_codebooks=4, codebook_bits=4)).eval()
    model.save(tmp_path / "model")
    vectors = theirs(load_st(tmp_path / "model" / "encoder"), prompt_name="document")
    tower = DualEncoder.load(tmp_path / "model").document_encoder
    assert max_difference(vectors, ours(tower, "w102: ")) == 0.0


# --- SentenceTransformer -> Encoder ---


@every_normalize
@every_pooling
def test_encoder_gives_the_vectors_of_a_saved_sentence_transformer(
    tiny_model: Path, tmp_path: Path, pooling: str, normalize: bool
) -> None:
    model = make_st(tiny_model, pooling=pooling, normalize=normalize, max_seq_length=20, prompts=PROMPTS)
    model.save(str(tmp_path / "model"), create_model_card=False)
    encoder = Encoder.load(tmp_path / "model", max_length=20)
    assert max_difference(ours(encoder, PROMPTS["query"]), theirs(model, prompt_name="query")) == 0.0


def test_encoder_reads_the_prompts_of_a_sentence_transformer(tiny_model: Path, tmp_path: Path) -> None:
    make_st(tiny_model, prompts=PROMPTS).save(str(tmp_path / "model"), create_model_card=False)
    settings = Encoder.load(tmp_path / "model").settings
    assert (settings.query_prompt, settings.document_prompt) == (PROMPTS["query"], PROMPTS["document"])


@pytest.mark.parametrize("max_length", [7, 20, 64])
def test_encoder_reads_the_length_of_a_sentence_transformer(
    tiny_model: Path, tmp_path: Path, max_length: int
) -> None:
    """From release 5.4, the length is in tokenizer_config.json and no longer in sentence_bert_config.json."""
    make_st(tiny_model, max_seq_length=max_length).save(str(tmp_path / "model"), create_model_card=False)
    assert Encoder.load(tmp_path / "model").settings.max_length == max_length


def test_encoder_reads_the_length_of_an_older_sentence_transformer(tiny_model: Path, tmp_path: Path) -> None:
    make_st(tiny_model).save(str(tmp_path / "model"), create_model_card=False)
    config = {"max_seq_length": 20, "do_lower_case": False}
    (tmp_path / "model" / "sentence_bert_config.json").write_text(json.dumps(config))
    assert Encoder.load(tmp_path / "model").settings.max_length == 20


def test_text_longer_than_the_positions_of_the_model_is_cut_there(tiny_model: Path, tmp_path: Path) -> None:
    """The tiny model has 64 positions; sentence-transformers cuts there where no shorter length is written."""
    make_st(tiny_model).save(str(tmp_path / "model"), create_model_card=False)
    tokens = Encoder.load(tmp_path / "model").tokenize([" ".join(["w1"] * 100)])
    assert tokens["input_ids"].shape == (1, 64)


def test_folder_goes_round_without_a_change_of_the_settings(tiny_model: Path, tmp_path: Path) -> None:
    encoder = Encoder.load(tiny_model, pooling="last", max_length=20, query_prompt="w100 ", normalize=False)
    encoder.save(tmp_path / "first")
    load_st(tmp_path / "first").save(str(tmp_path / "second"), create_model_card=False)
    assert Encoder.load(tmp_path / "second").settings == encoder.settings


@every_pooling
def test_folder_goes_round_without_a_change_of_the_vectors(
    tiny_model: Path, tmp_path: Path, pooling: str
) -> None:
    encoder = Encoder.load(tiny_model, pooling=pooling, max_length=20)
    encoder.save(tmp_path / "first")
    load_st(tmp_path / "first").save(str(tmp_path / "second"), create_model_card=False)
    again = Encoder.load(tmp_path / "second", max_length=20)
    assert max_difference(ours(again, "w100 "), ours(encoder, "w100 ")) == 0.0


def test_pooling_that_leaves_the_prompt_out_is_refused_or_followed(tiny_model: Path, tmp_path: Path) -> None:
    model = make_st(tiny_model, include_prompt=False, prompts=PROMPTS, max_seq_length=20)
    model.save(str(tmp_path / "model"), create_model_card=False)
    try:
        encoder = Encoder.load(tmp_path / "model", max_length=20)
    except InputError:
        return
    assert max_difference(ours(encoder, PROMPTS["query"]), theirs(model, prompt_name="query")) == 0.0


def test_lower_casing_outside_the_tokenizer_is_refused_or_followed(tiny_model: Path, tmp_path: Path) -> None:
    """`do_lower_case` of sentence_bert_config.json lowers the case for tokenizers that keep it."""
    shutil.copytree(tiny_model, tmp_path / "cased")
    path = tmp_path / "cased" / "tokenizer.json"
    path.write_text(path.read_text().replace('"lowercase": true', '"lowercase": false'))
    path = tmp_path / "cased" / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"do_lower_case": true', '"do_lower_case": false'))
    make_st(tmp_path / "cased").save(str(tmp_path / "model"), create_model_card=False)
    config = {"max_seq_length": 20, "do_lower_case": True}
    (tmp_path / "model" / "sentence_bert_config.json").write_text(json.dumps(config))
    try:
        encoder = Encoder.load(tmp_path / "model")
    except InputError:
        return
    assert max_difference(ours(encoder), theirs(load_st(tmp_path / "model"))) == 0.0


def test_model_with_a_dense_module_that_is_not_linear_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    modules = [Transformer(str(tiny_model)), Pooling(32, "mean"), Dense(32, 8)]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "model"), create_model_card=False)
    with pytest.raises(InputError, match=r"2_Dense/config\.json has the activation .*Tanh"):
        Encoder.load(tmp_path / "model")


@pytest.mark.parametrize("pooling", ["max", "weightedmean", ("cls", "mean")])
def test_model_with_an_unknown_pooling_is_refused(
    tiny_model: Path, tmp_path: Path, pooling: str | tuple[str, ...]
) -> None:
    modules = [Transformer(str(tiny_model)), Pooling(32, pooling)]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "model"), create_model_card=False)
    with pytest.raises(InputError, match=r"pools by .*; Endex knows"):
        Encoder.load(tmp_path / "model")
