"""What every compression head keeps: its contract, its folder, its bytes, its scores.

Shapes: N vectors, D dimensions, M codebooks, K codewords, S = D // M sub-dimensions.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from retriever import InputError
from retriever.dual_encoder import load_head, save_head
from retriever.heads import (
    HEADS,
    CNTConfig,
    CompressionHead,
    HeadConfig,
    IVFFlatConfig,
    IVFProductQuantizerConfig,
    IVFResidualQuantizerConfig,
    NoCompressionConfig,
    PCAConfig,
    ProductQuantizer,
    ProductQuantizerConfig,
    ProjectionConfig,
    QINCo2Config,
    QINCoConfig,
    ResidualQuantizerConfig,
    UNQConfig,
)
from retriever.scores import score_matrix

D = 24
SEEDS = (0, 1, 2)
CONFIGS: dict[str, list[HeadConfig]] = {
    "none": [NoCompressionConfig()],
    "pq": [
        ProductQuantizerConfig(num_codebooks=4, codebook_bits=4, rotation="none"),
        ProductQuantizerConfig(num_codebooks=3, codebook_bits=5, estimator="softmax", metric="inner_product"),
        ProductQuantizerConfig(num_codebooks=6, codebook_bits=8, rotation="opq", estimator="identity"),
        ProductQuantizerConfig(
            num_codebooks=4,
            codebook_bits=4,
            rotation="givens_greedy",
            distortion_weight=1.0,
        ),
        ProductQuantizerConfig(num_codebooks=4, codebook_bits=4, assignment="frozen"),
        ProductQuantizerConfig(num_codebooks=4, codebook_bits=4, rotation="cayley", selection="mix"),
        ProductQuantizerConfig(
            num_codebooks=4, codebook_bits=4, rotation="free", metric="inner_product", selection="dpq"
        ),
    ],
    "ivfpq": [
        IVFProductQuantizerConfig(num_lists=5, num_codebooks=4, codebook_bits=4, rotation="none"),
        IVFProductQuantizerConfig(
            num_lists=257, num_codebooks=3, codebook_bits=5, estimator="softmax", metric="inner_product"
        ),
        IVFProductQuantizerConfig(
            num_lists=1,
            num_codebooks=6,
            codebook_bits=8,
            rotation="givens_steepest",
            estimator="identity",
            distortion_weight=1.0,
            residual_start=False,
        ),
        IVFProductQuantizerConfig(
            num_lists=9,
            num_codebooks=4,
            codebook_bits=4,
            assignment="frozen_in_training",
            list_assignment="frozen",
        ),
        IVFProductQuantizerConfig(num_lists=16, num_codebooks=4, codebook_bits=4, list_structure="gno_imi"),
    ],
    "rq": [
        ResidualQuantizerConfig(num_codebooks=5, codebook_bits=4, beam=3),
        ResidualQuantizerConfig(
            num_codebooks=1, codebook_bits=8, estimator="identity", distortion_weight=1.0
        ),
        ResidualQuantizerConfig(
            num_codebooks=3, codebook_bits=5, beam=1, estimator="softmax", metric="inner_product"
        ),
    ],
    "ivfrq": [
        IVFResidualQuantizerConfig(num_lists=5, num_codebooks=5, codebook_bits=4),
        IVFResidualQuantizerConfig(
            num_lists=257, num_codebooks=3, codebook_bits=5, estimator="softmax", metric="inner_product"
        ),
        IVFResidualQuantizerConfig(
            num_lists=1, num_codebooks=2, codebook_bits=3, estimator="identity", list_assignment="frozen"
        ),
        IVFResidualQuantizerConfig(num_lists=4, num_codebooks=2, codebook_bits=3, list_structure="no_imi"),
    ],
    "qinco": [
        QINCoConfig(num_codebooks=3, codebook_bits=4, hidden=16, commitment_weight=0.5),
        QINCoConfig(
            num_codebooks=2,
            codebook_bits=5,
            hidden=8,
            num_lists=257,
            metric="inner_product",
            network_start="random",
            concat_rank=4,
            task_gradient=True,
        ),
    ],
    "qinco2": [
        QINCo2Config(num_codebooks=3, codebook_bits=4, hidden=16, width=12, candidates=4, beam=3),
        QINCo2Config(
            num_codebooks=2,
            codebook_bits=8,
            num_lists=5,
            width=24,
            hidden=8,
            beam=2,
            metric="inner_product",
            pout_zero_init=False,
            start_noise=0.1,
            task_gradient=True,
        ),
        QINCo2Config(num_codebooks=1, codebook_bits=3),
    ],
    "unq": [
        UNQConfig(num_codebooks=3, codebook_bits=4, code_dim=8, hidden=16, start_steps=2, start_batch=16),
        UNQConfig(
            num_codebooks=2,
            codebook_bits=5,
            code_dim=4,
            hidden=16,
            num_layers=1,
            metric="inner_product",
            triplet_weight=0.01,
            task_gradient=True,
            start_steps=0,
        ),
    ],
    "cnt": [
        CNTConfig(expansion=2, tokens=3),
        CNTConfig(inner=IVFFlatConfig(num_lists=5)),
        CNTConfig(
            tokens=8,
            start="sparse",
            inner=ProductQuantizerConfig(num_codebooks=3, codebook_bits=4, estimator="softmax"),
        ),
        CNTConfig(
            expansion=1,
            tokens=2,
            mlp_ratio=2,
            inner=IVFProductQuantizerConfig(num_lists=5, num_codebooks=4, codebook_bits=4),
        ),
    ],
    "pca": [
        PCAConfig(components=7),
        PCAConfig(components=8, inner=IVFFlatConfig(num_lists=5)),
        PCAConfig(
            components=12,
            inner=IVFProductQuantizerConfig(
                num_lists=5, num_codebooks=4, codebook_bits=4, estimator="softmax"
            ),
        ),
    ],
    "projection": [
        ProjectionConfig(
            components=8, inner=IVFResidualQuantizerConfig(num_lists=5, num_codebooks=3, codebook_bits=4)
        ),
        ProjectionConfig(
            components=8, inner=ResidualQuantizerConfig(num_codebooks=3, codebook_bits=4), query_weight=1.0
        ),
    ],
    "ivfflat": [
        IVFFlatConfig(num_lists=5),
        IVFFlatConfig(num_lists=257, metric="inner_product", list_assignment="frozen", distortion_weight=0.0),
    ],
}
every_head = pytest.mark.parametrize(
    "config", [config for configs in CONFIGS.values() for config in configs], ids=repr
)


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthonormal(dim: int, seed: int) -> Tensor:
    return torch.linalg.qr(rand(dim, dim, seed=seed)).Q


def make_pq(seed: int, dim: int = D, **options: object) -> ProductQuantizer:
    """Return a quantizer with random codebooks and, with rotation "opq", a random rotation."""
    options = {"num_codebooks": 4, "codebook_bits": 4, "rotation": "none"} | options
    head = ProductQuantizerConfig(**options).build(dim)
    with torch.no_grad():
        head.codebooks.copy_(rand(*head.codebooks.shape, seed=seed))
        if head.config.rotation == "opq":
            head.rotation.copy_(orthonormal(dim, seed))
    return head


class RandomFit:
    """A `QuantizerFit` without k-means: a random rotation, and vectors of the sample as codewords."""

    def product_codebooks(
        self, sample: Tensor, *, num_codebooks: int, codebook_bits: int, rotate: bool, seed: int
    ) -> tuple[Tensor | None, Tensor]:
        rotation = orthonormal(sample.shape[1], seed) if rotate else None
        z = sample if rotation is None else sample @ rotation.T
        codebooks = z[: 2**codebook_bits].view(2**codebook_bits, num_codebooks, -1).transpose(0, 1)
        return rotation, codebooks

    def coarse_product_codebooks(
        self,
        sample: Tensor,
        *,
        num_lists: int,
        num_codebooks: int,
        codebook_bits: int,
        rotate: bool,
        on_residuals: bool,
        seed: int,
        leave_one_out: bool = False,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        rotation = orthonormal(sample.shape[1], seed) if rotate else None
        z = sample if rotation is None else sample @ rotation.T
        centroids = z[-num_lists:]
        rest = z - centroids[torch.cdist(z, centroids).argmin(1)] if on_residuals else z
        codebooks = rest[: 2**codebook_bits].view(2**codebook_bits, num_codebooks, -1).transpose(0, 1)
        return rotation, centroids, codebooks

    def additive_codebooks(
        self, sample: Tensor, *, num_codebooks: int, codebook_bits: int, seed: int, **_: int
    ) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(len(sample), (num_codebooks, 2**codebook_bits), generator=generator)
        return sample[rows] * 0.7 ** torch.arange(num_codebooks)[:, None, None]

    def coarse_additive_codebooks(
        self, sample: Tensor, *, num_lists: int, **options: int
    ) -> tuple[Tensor, Tensor]:
        return sample[-num_lists:], 0.7 * self.additive_codebooks(sample, **options)


def make_head(config: HeadConfig, seed: int) -> CompressionHead:
    """Return the head of a configuration with starting values from a random sample."""
    head = config.build(D)
    head.warm_start(rand(300, D, seed=seed), RandomFit(), seed)
    return head.eval()


# --- scores ---


@pytest.mark.parametrize("seed", SEEDS)
def test_inner_product_score_is_the_sum_of_products(seed: int) -> None:
    q, x = rand(5, D, seed=seed), rand(7, D, seed=seed + 100)
    expected = [[sum(a * b for a, b in zip(u, v, strict=True)) for v in x.tolist()] for u in q.tolist()]
    np.testing.assert_allclose(score_matrix(q, x, "inner_product").numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_l2_score_is_one_less_half_the_squared_distance(seed: int) -> None:
    q, x = rand(5, D, seed=seed), rand(7, D, seed=seed + 100)
    expected = [[1 - (u - v).square().sum().item() / 2 for v in x.double()] for u in q.double()]
    np.testing.assert_allclose(score_matrix(q, x, "l2").numpy(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_scores_of_unit_vectors_are_equal_by_either_metric(seed: int) -> None:
    q, x = (torch.nn.functional.normalize(rand(5, D, seed=seed + shift), dim=1) for shift in (0, 100))
    torch.testing.assert_close(
        score_matrix(q, x, "l2"), score_matrix(q, x, "inner_product"), rtol=0, atol=1e-6
    )


# --- no compression ---


def test_uncompressed_vectors_decode_to_the_same_bits() -> None:
    head = NoCompressionConfig().build(D)
    x = rand(20, D, seed=0)
    assert torch.equal(head.decode(head.encode(x)), x)


# --- every head ---


def test_every_head_is_tested_here() -> None:
    assert list(CONFIGS) == list(HEADS)


@every_head
def test_config_is_registered_under_its_name(config: HeadConfig) -> None:
    assert HEADS[config.name] is type(config)


@every_head
def test_forward_returns_the_shapes_of_its_contract(config: HeadConfig) -> None:
    head = make_head(config, seed=0)
    output = head(rand(7, D, seed=1))
    assert (output.reconstruction.shape, output.codes.shape) == (
        (7, head.out_dim),
        (7, head.num_codes),
    )


@every_head
def test_forward_reconstructs_what_the_codes_decode_to(config: HeadConfig) -> None:
    head = make_head(config, seed=0)
    x = rand(30, D, seed=1)
    torch.testing.assert_close(head(x).reconstruction, head.decode(head.encode(x)), rtol=0, atol=1e-5)


@every_head
def test_forward_and_encode_choose_the_same_codes(config: HeadConfig) -> None:
    head = make_head(config, seed=0)
    x = rand(30, D, seed=1)
    assert torch.equal(head(x).codes, head.encode(x))


@every_head
def test_gradient_reaches_every_vector(config: HeadConfig) -> None:
    head = make_head(config, seed=0)
    x = rand(30, D, seed=1).requires_grad_()
    head(x).reconstruction.backward(rand(30, head.out_dim, seed=2))
    assert bool(x.grad.norm(dim=1).gt(0).all())


@every_head
def test_saved_head_is_loaded_with_equal_config_and_state(config: HeadConfig, tmp_path: Path) -> None:
    head = make_head(config, seed=0)
    head.count(head.encode(rand(30, D, seed=1)))
    save_head(head, tmp_path / "head")
    loaded = load_head(tmp_path / "head")
    assert loaded.config == config
    assert {name: value.tolist() for name, value in loaded.state_dict().items()} == {
        name: value.tolist() for name, value in head.state_dict().items()
    }


@every_head
def test_saved_head_gives_equal_codes_and_vectors(config: HeadConfig, tmp_path: Path) -> None:
    head = make_head(config, seed=0)
    save_head(head, tmp_path / "head")
    loaded = load_head(tmp_path / "head")
    x = rand(30, D, seed=1)
    assert torch.equal(loaded.encode(x), head.encode(x))
    assert torch.equal(loaded.decode(loaded.encode(x)), head.decode(head.encode(x)))


@every_head
def test_mapped_queries_have_the_dimension_of_decoded_vectors(config: HeadConfig) -> None:
    head = make_head(config, seed=0)
    assert (
        head.map_queries(rand(3, D, seed=1)).shape[1] == head.decode(head.encode(rand(3, D, seed=1))).shape[1]
    )


@every_head
def test_only_a_head_that_says_so_maps_queries(config: HeadConfig) -> None:
    q = rand(3, D, seed=1)
    assert config.maps == (make_head(config, seed=0).map_queries(q) is not q)


@every_head
def test_a_batch_is_compressed_as_its_documents_and_queries_are(config: HeadConfig) -> None:
    head, x, q = make_head(config, seed=0), rand(7, D, seed=1), rand(3, D, seed=2)
    output, queries = head.compress_batch(x, q)
    torch.testing.assert_close(output.reconstruction, head(x).reconstruction, rtol=0, atol=1e-5)
    torch.testing.assert_close(queries, head.map_queries(q), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "bits"),
    [
        (NoCompressionConfig(), 32 * D),
        (ProductQuantizerConfig(num_codebooks=4, codebook_bits=5), 20),
        (IVFResidualQuantizerConfig(num_codebooks=3, codebook_bits=4, num_lists=40), 12 + math.log2(40)),
        (QINCoConfig(num_codebooks=3, codebook_bits=4), 12),
        (QINCoConfig(num_codebooks=3, codebook_bits=4, num_lists=40), 12 + math.log2(40)),
        (PCAConfig(components=8, inner=IVFFlatConfig(num_lists=5)), 32 * 8 + math.log2(5)),
    ],
    ids=repr,
)
def test_the_rate_is_the_bits_of_code_and_list_number(config: HeadConfig, bits: float) -> None:
    assert config.build(D).rate == pytest.approx(bits)


@every_head
def test_packed_codes_decode_to_the_same_vectors(config: HeadConfig) -> None:
    head = make_head(config, seed=0)
    codes = head.encode(rand(30, D, seed=1))
    assert torch.equal(head.decode(head.unpack(head.pack(codes))), head.decode(codes))


@every_head
def test_code_size_is_the_bytes_of_a_packed_row(config: HeadConfig) -> None:
    head = make_head(config, seed=0)
    assert head.pack(head.encode(rand(3, D, seed=1))).shape == (3, head.code_size)


@every_head
def test_exported_metric_is_that_of_the_head(config: HeadConfig) -> None:
    head = make_head(config, seed=0)
    assert head.export().metric == head.metric


@pytest.mark.parametrize("metric", ["inner_product", "l2"])
def test_metric_of_a_quantizer_is_that_of_its_config(metric: str) -> None:
    assert make_pq(0, metric=metric).metric == metric


def test_uncompressed_vectors_are_scored_by_the_inner_product() -> None:
    assert NoCompressionConfig().build(D).metric == "inner_product"


def test_exported_rotation_and_codebooks_decode_codes_as_the_head_does() -> None:
    head = make_pq(0, rotation="opq")
    codes = head.encode(rand(30, D, seed=1))
    export = head.export()
    joined = torch.stack([torch.cat([export.codebooks[m, row[m]] for m in range(4)]) for row in codes])
    expected = torch.linalg.solve(export.rotation, joined.T).T  # x of A x = y
    torch.testing.assert_close(head.decode(codes).detach(), expected, rtol=0, atol=1e-5)


def test_export_without_rotation_has_none() -> None:
    assert make_pq(0, rotation="none").export().rotation is None


def test_head_of_an_unknown_name_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    save_head(NoCompressionConfig().build(D), tmp_path / "head")
    path = tmp_path / "head" / "config.json"
    path.write_text(path.read_text().replace('"none"', '"hologram"'))
    with pytest.raises(InputError, match=r"holds a head 'hologram'; this Endex knows none, pq, .*\. Upgrade"):
        load_head(tmp_path / "head")


def test_infinite_restart_window_survives_saving(tmp_path: Path) -> None:
    config = replace(CONFIGS["pq"][0], restart_window=float("inf"))
    save_head(config.build(D), tmp_path / "head")
    assert load_head(tmp_path / "head").config == config
