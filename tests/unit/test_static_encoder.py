"""A static encoder's vector is the mean of its tokens' vectors, on disk as sentence-transformers has it.

Shapes: B texts, L tokens, V token ids, D dimensions.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, StaticEmbedding
from tokenizers import Tokenizer
from torch import Tensor

from retriever import (
    Document,
    DualEncoder,
    DualEncoderConfig,
    Encoder,
    InputError,
    embed_documents,
    static_encoder,
)
from retriever.dual_encoder import encode_by_length
from retriever.heads import NoCompressionConfig, ProductQuantizerConfig
from retriever.token_bag import NO_LIMIT, TokenBag

DIM, ROWS, SPECIAL = 8, 125, 5
WORDS = [f"w{row}" for row in range(120)]
TEXTS = ["w1", "w2 w3 w4 w4", "", " ".join(f"w{i}" for i in range(60)), "W5 unknown w6, w7."]
PROMPTS = {"query": "w100 w101 ", "document": "w102 "}

every_normalize = pytest.mark.parametrize("normalize", [True, False], ids=["unit", "free"])


@pytest.fixture
def theirs(tiny_model: Path, tmp_path: Path) -> Callable[..., SentenceTransformer]:
    """Make a sentence-transformers model of random token vectors."""

    def make(*, normalize: bool = True, prompts: dict[str, str] | None = None) -> SentenceTransformer:
        weight = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(0))
        bag = StaticEmbedding(Tokenizer.from_file(str(tiny_model / "tokenizer.json")), weight)
        return SentenceTransformer(
            modules=[bag, *([Normalize()] if normalize else [])], prompts=prompts, device="cpu"
        )

    return make


@pytest.fixture
def folder(theirs: Callable[..., SentenceTransformer], tmp_path: Path) -> Path:
    theirs().save(str(tmp_path / "static"), create_model_card=False)
    return tmp_path / "static"


@pytest.fixture
def encoder(folder: Path) -> Encoder:
    return Encoder.load(folder)


def matrix(encoder: Encoder) -> Tensor:
    assert isinstance(encoder.backbone, TokenBag)
    return encoder.backbone.embedding.weight


def token_ids(encoder: Encoder, text: str) -> list[int]:
    return encoder.tokenizer.encode(text, add_special_tokens=False).ids  # type: ignore[no-any-return]


def embed(encoder: Encoder, texts: list[str], prompt: str = "") -> Tensor:
    with torch.no_grad():
        return encoder(encoder.tokenize(texts, prompt))  # type: ignore[no-any-return]


def st_embed(model: SentenceTransformer, **options: str) -> Tensor:
    return torch.from_numpy(np.asarray(model.encode(TEXTS, show_progress_bar=False, **options)))


# --- vectors ---


def test_vectors_are_of_the_shape_texts_times_dimension(encoder: Encoder) -> None:
    assert embed(encoder, TEXTS).shape == (len(TEXTS), encoder.dim) == (5, DIM)


@every_normalize
def test_vector_is_the_mean_of_the_tokens_in_float64(encoder: Encoder, normalize: bool) -> None:
    weight = matrix(encoder).detach().double()
    rows = [token_ids(encoder, text) for text in TEXTS]
    expected = torch.stack(
        [sum((weight[i] for i in ids), torch.zeros(DIM)) / max(1, len(ids)) for ids in rows]
    )
    if normalize:
        expected = expected / expected.norm(dim=1, keepdim=True).clamp(min=1e-12)
    found = embed(encoder.with_settings(normalize=normalize), TEXTS).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("empty", ["", "   "], ids=["empty", "spaces"])
def test_text_without_tokens_has_the_vector_zero(encoder: Encoder, empty: str) -> None:
    assert torch.equal(embed(encoder, [empty, "w1"])[0], torch.zeros(DIM))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_batch_without_any_token_is_embedded(encoder: Encoder, count: int) -> None:
    assert torch.equal(embed(encoder, [""] * count), torch.zeros(count, DIM))


def test_special_tokens_are_not_in_the_mean(encoder: Encoder) -> None:
    names = {encoder.tokenizer.id_to_token(i) for i in encoder.tokenize(["w1 w2"])["input_ids"][0].tolist()}
    assert names == {"w1", "w2"}


def test_vector_does_not_depend_on_the_other_texts(encoder: Encoder) -> None:
    alone = torch.cat([embed(encoder, [text]) for text in TEXTS])
    torch.testing.assert_close(embed(encoder, TEXTS), alone, rtol=0, atol=1e-7)


def test_order_of_the_tokens_does_not_matter(encoder: Encoder) -> None:
    found = embed(encoder, ["w1 w2 w3", "w3 w1 w2"])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)


def test_groups_of_like_length_give_the_same_vectors(encoder: Encoder) -> None:
    texts = [" ".join(["w1", "w2", "w3"] * count) for count in range(1, 41)]
    tokens = encoder.tokenize(texts)
    torch.testing.assert_close(encode_by_length(encoder, tokens), encoder(tokens), rtol=0, atol=1e-7)


def test_documents_are_embedded_in_their_order(encoder: Encoder) -> None:
    model = DualEncoder(encoder, encoder, NoCompressionConfig().build(DIM))
    documents = [Document(str(row), "", text) for row, text in enumerate(TEXTS)]
    found = embed_documents(model, documents, batch_size=2)
    torch.testing.assert_close(found, embed(encoder, TEXTS), rtol=0, atol=1e-7)


# --- gradients ---


def test_gradient_is_the_tokens_share_of_the_mean(encoder: Encoder) -> None:
    free = encoder.with_settings(normalize=False)
    direction = torch.randn(len(TEXTS), DIM, generator=torch.Generator().manual_seed(1))
    (free(free.tokenize(TEXTS)) * direction).sum().backward()
    expected = torch.zeros(ROWS, DIM, dtype=torch.float64)
    for text, row in zip(TEXTS, direction.double(), strict=True):
        ids = token_ids(encoder, text)
        for token in ids:
            expected[token] += row / len(ids)
    torch.testing.assert_close(matrix(encoder).grad.double(), expected, rtol=0, atol=1e-6)


def test_gradient_through_the_normalization_is_that_of_finite_differences(encoder: Encoder) -> None:
    encoder.double()
    tokens, weight = encoder.tokenize(["w1 w2 w2", "w3"]), matrix(encoder)

    def loss() -> Tensor:  # Encoder returns float32, too coarse for differences
        vectors = torch.nn.functional.normalize(encoder.backbone(**tokens), dim=-1)
        return (vectors * torch.arange(2 * DIM).view(2, DIM)).sum()

    loss().backward()
    row, column, step = token_ids(encoder, "w2")[0], 3, 1e-6
    with torch.no_grad():
        weight[row, column] += step
        above = loss()
        weight[row, column] -= 2 * step
        below = loss()
    assert weight.grad[row, column].item() == pytest.approx(((above - below) / (2 * step)).item(), rel=1e-6)


def test_gradient_is_finite_where_a_text_has_no_tokens(encoder: Encoder) -> None:
    encoder(encoder.tokenize(["", "w1"])).sum().backward()
    assert matrix(encoder).grad.isfinite().all()


def test_optimizer_steps_change_only_the_tokens_seen(encoder: Encoder) -> None:
    before = matrix(encoder).detach().clone()
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    encoder(encoder.tokenize(["w1 w2"]))[:, 0].sum().backward()
    optimizer.step()
    changed = (matrix(encoder) != before).any(1).nonzero().squeeze(1).tolist()
    assert changed == sorted(token_ids(encoder, "w1 w2"))


# --- prompts, lengths, settings ---


def test_text_is_cut_at_max_length_with_the_prompt(encoder: Encoder) -> None:
    tokens = encoder.with_settings(max_length=3).tokenize(["w5 w6 w7"], "w1 ")
    assert [encoder.tokenizer.id_to_token(i) for i in tokens["input_ids"][0].tolist()] == ["w1", "w5", "w6"]


def test_towers_of_other_lengths_do_not_change_each_other(encoder: Encoder, tmp_path: Path) -> None:
    short, long = encoder.with_settings(max_length=4), encoder.with_settings(max_length=20)
    short.save(tmp_path / "short")
    assert [tower.tokenize([TEXTS[3]])["input_ids"].shape[1] for tower in (long, short)] == [20, 4]


def test_encoders_with_other_settings_share_the_weights(encoder: Encoder) -> None:
    assert encoder.with_settings(max_length=8).backbone is encoder.backbone


def test_folder_without_a_length_keeps_every_token(encoder: Encoder) -> None:
    assert encoder.settings.max_length == NO_LIMIT
    assert encoder.tokenize([" ".join(["w1"] * 3000)])["input_ids"].shape == (1, 3000)


@pytest.mark.parametrize("pooling", ["cls", "last"])
def test_pooling_other_than_the_mean_is_refused(folder: Path, pooling: str) -> None:
    with pytest.raises(InputError, match=rf"pools by mean only, got pooling '{pooling}'"):
        Encoder.load(folder, pooling=pooling)


# --- saved and loaded ---


@every_normalize
@pytest.mark.parametrize("max_length", [NO_LIMIT, 6])
def test_saved_encoder_is_loaded_bit_for_bit(
    encoder: Encoder, tmp_path: Path, max_length: int, normalize: bool
) -> None:
    changed = encoder.with_settings(
        normalize=normalize, max_length=max_length, query_prompt="w1 ", document_prompt="w2: "
    )
    changed.save(tmp_path / "model")
    loaded = Encoder.load(tmp_path / "model")
    assert loaded.settings == changed.settings
    assert torch.equal(matrix(loaded), matrix(changed))
    assert torch.equal(embed(loaded, TEXTS, "w3 "), embed(changed, TEXTS, "w3 "))


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_dual_encoder_of_static_towers_goes_round(folder: Path, tmp_path: Path, tie: bool) -> None:
    config = DualEncoderConfig(encoder=str(folder), tie=tie, query_max_length=4, document_max_length=9)
    model = config.build(ProductQuantizerConfig(num_codebooks=4, codebook_bits=4)).eval()
    model.save(tmp_path / "model")
    loaded = DualEncoder.load(tmp_path / "model")
    assert (loaded.tied, loaded.query_encoder.settings.max_length) == (tie, 4)
    documents = [Document(str(row), "w9", text) for row, text in enumerate(TEXTS)]
    assert torch.equal(embed_documents(loaded, documents), embed_documents(model, documents))


# --- sentence-transformers ---


@every_normalize
@pytest.mark.parametrize("side", PROMPTS)
@pytest.mark.parametrize("max_length", [NO_LIMIT, 5])
def test_sentence_transformers_gives_the_vectors_of_a_saved_encoder(
    encoder: Encoder, tmp_path: Path, side: str, normalize: bool, max_length: int
) -> None:
    saved = encoder.with_settings(
        normalize=normalize,
        max_length=max_length,
        query_prompt=PROMPTS["query"],
        document_prompt=PROMPTS["document"],
    )
    saved.save(tmp_path / "model")
    model = SentenceTransformer(str(tmp_path / "model"), device="cpu", local_files_only=True)
    difference = st_embed(model, prompt_name=side) - embed(saved, TEXTS, PROMPTS[side])
    assert difference.abs().max() < 1e-6


@every_normalize
def test_encoder_gives_the_vectors_of_a_saved_sentence_transformer(
    theirs: Callable[..., SentenceTransformer], tmp_path: Path, normalize: bool
) -> None:
    model = theirs(normalize=normalize, prompts=PROMPTS)
    model.save(str(tmp_path / "model"), create_model_card=False)
    loaded = Encoder.load(tmp_path / "model")
    assert loaded.settings.query_prompt == PROMPTS["query"]
    difference = embed(loaded, TEXTS, PROMPTS["query"]) - st_embed(model, prompt_name="query")
    assert difference.abs().max() < 1e-6


@pytest.mark.parametrize("path", ["", ".", "0_StaticEmbedding"])
def test_files_are_found_in_the_folder_that_the_module_list_names(folder: Path, path: str) -> None:
    expected = embed(Encoder.load(folder), TEXTS)
    modules = json.loads((folder / "modules.json").read_text())
    old = modules[0]["path"]
    (folder / path).mkdir(exist_ok=True)
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / old / name).rename(folder / path / name)
    modules[0] |= {"path": path, "type": "sentence_transformers.models.StaticEmbedding"}
    (folder / "modules.json").write_text(json.dumps(modules))
    assert torch.equal(embed(Encoder.load(folder), TEXTS), expected)


def test_model2vec_names_are_read_as_sentence_transformers_reads_them(folder: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    tensors = {
        "embeddings": torch.randn(9, DIM, generator=generator).half(),
        "mapping": torch.randint(9, (ROWS,), generator=generator),
        "weights": torch.rand(ROWS, generator=generator).double(),
    }
    save_file(tensors, weights_of(folder))
    expected = tensors["embeddings"].float()[tensors["mapping"]] * tensors["weights"].float()[:, None]
    assert torch.equal(matrix(Encoder.load(folder)), expected)


# --- folders that are refused ---


def weights_of(folder: Path) -> Path:
    return next(folder.rglob("model.safetensors"))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_missing_file_is_named(folder: Path, name: str) -> None:
    next(folder.rglob(name)).unlink()
    with pytest.raises(InputError, match=rf"the model .* has no file .*{name}"):
        Encoder.load(folder)


def test_file_that_is_cut_short_is_named(folder: Path) -> None:
    path = weights_of(folder)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"model\.safetensors is not a safetensors file"):
        Encoder.load(folder)


def test_tokenizer_that_is_damaged_is_named(folder: Path) -> None:
    next(folder.rglob("tokenizer.json")).write_text("{")
    with pytest.raises(InputError, match=r"tokenizer\.json is not a tokenizer"):
        Encoder.load(folder)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"other": torch.ones(ROWS, DIM)}, r"must hold a matrix embedding\.weight .*, got other \(125, 8\)"),
        ({"embedding.weight": torch.ones(ROWS)}, r"must hold a matrix embedding\.weight .*\(125,\)"),
        ({"embedding.weight": torch.ones(9, DIM)}, r"has 9 rows, but .* has token ids up to 124"),
        ({"embedding.weight": torch.full((ROWS, DIM), math.nan)}, r"vectors that are not finite"),
    ],
    ids=["name", "shape", "rows", "nan"],
)
def test_faulty_matrix_is_refused_with_what_is_wrong(
    folder: Path, tensors: dict[str, Tensor], message: str
) -> None:
    save_file(tensors, weights_of(folder))
    with pytest.raises(InputError, match=message):
        Encoder.load(folder)


def test_tokenizer_that_keeps_the_last_tokens_is_refused(folder: Path) -> None:
    path = next(folder.rglob("tokenizer.json"))
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(5, direction="left")
    tokenizer.save(str(path))
    with pytest.raises(InputError, match="cuts texts on the left"):
        Encoder.load(folder)


def test_module_after_the_token_vectors_that_is_not_linear_is_refused(
    theirs: Callable[..., SentenceTransformer], tmp_path: Path
) -> None:
    model = SentenceTransformer(modules=[theirs()[0], Dense(DIM, 4)], device="cpu")
    model.save(str(tmp_path / "model"), create_model_card=False)
    with pytest.raises(InputError, match=r"1_Dense/config\.json has the activation .*Tanh"):
        Encoder.load(tmp_path / "model")


@pytest.mark.parametrize("modules", [{}, [{"path": ""}], ["x"]], ids=repr)
def test_module_list_of_another_form_is_named(folder: Path, modules: object) -> None:
    (folder / "modules.json").write_text(json.dumps(modules if modules else {"type": "x"}))
    with pytest.raises(InputError, match=r"modules\.json must be a list of modules"):
        Encoder.load(folder)


# --- from a transformer ---


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_token_vector_is_the_transformers_vector_of_the_token_alone(tiny_model: Path, pooling: str) -> None:
    transformer = Encoder.load(tiny_model, pooling=pooling, normalize=False).eval()
    static = static_encoder(transformer, sif=None, batch_size=7)
    alone = embed(transformer, WORDS)
    torch.testing.assert_close(embed(static, WORDS), alone - alone.mean(0), rtol=0, atol=1e-6)


def test_sif_weights_a_token_by_its_rank(tiny_model: Path) -> None:
    transformer = Encoder.load(tiny_model)
    equal, weighted = (matrix(static_encoder(transformer, sif=sif)) for sif in (None, 1e-2))
    share = 1 / sum(1 / rank for rank in range(1, 121))  # of the first of 120 words
    ranks = torch.tensor([1] * SPECIAL + list(range(1, 121)))
    expected = equal * (1e-2 / (1e-2 + share / ranks))[:, None]
    torch.testing.assert_close(weighted, expected, rtol=0, atol=1e-6)


def test_unused_token_counts_as_little_as_the_most_frequent(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    for path in (tmp_path / "model").iterdir():
        if path.name in ("vocab.txt", "tokenizer.json"):
            path.write_text(path.read_text().replace("w119", "[unused7]"))
    transformer = Encoder.load(tmp_path / "model")
    equal, weighted = (matrix(static_encoder(transformer, sif=sif)) for sif in (None, 1e-2))
    ratio = weighted.norm(dim=1) / equal.norm(dim=1)
    assert ratio[-1].item() == pytest.approx(ratio[SPECIAL].item(), rel=1e-5)


def test_principal_components_keep_the_most_of_the_variance(tiny_model: Path) -> None:
    transformer = Encoder.load(tiny_model)
    whole, part = (
        matrix(static_encoder(transformer, dim=dim, sif=None))[SPECIAL:].double() for dim in (None, 6)
    )
    values = torch.linalg.svdvals(whole)
    assert part.shape == (120, 6)
    assert part.square().sum().item() == pytest.approx(values[:6].square().sum().item(), rel=1e-5)


def test_static_encoder_takes_normalization_and_length_but_no_prompt(tiny_model: Path) -> None:
    transformer = Encoder.load(tiny_model, normalize=False, max_length=9, query_prompt="w1 ")
    settings = static_encoder(transformer).settings
    assert (settings.normalize, settings.max_length, settings.query_prompt) == (False, 9, "")


def test_the_transformer_is_not_changed(tiny_model: Path) -> None:
    transformer = Encoder.load(tiny_model).train()
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    static_encoder(transformer)
    assert transformer.training
    assert transformer.backbone.training
    assert all(torch.equal(value, before[name]) for name, value in transformer.state_dict().items())


def test_static_encoder_of_a_transformer_can_be_trained_and_saved(tiny_model: Path, tmp_path: Path) -> None:
    static = static_encoder(Encoder.load(tiny_model))
    static(static.tokenize(["w1 w2"]))[:, 0].sum().backward()
    assert matrix(static).grad is not None
    static.save(tmp_path / "static")
    assert torch.equal(embed(Encoder.load(tmp_path / "static"), TEXTS), embed(static, TEXTS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 33}, "dim must be between 1 and the encoder's 32, got 33"),
        ({"dim": 0}, "dim must be between 1 and the encoder's 32, got 0"),
        ({"sif": 0.0}, r"sif must be positive, got 0\.0"),
        ({"sif": math.nan}, "sif must be positive, got nan"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_faulty_option_is_refused_with_its_value(
    tiny_model: Path, options: dict[str, float], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        static_encoder(Encoder.load(tiny_model), **options)  # type: ignore[arg-type]


def test_static_encoder_of_a_static_encoder_is_refused(encoder: Encoder) -> None:
    with pytest.raises(InputError, match="static already"):
        static_encoder(encoder)
