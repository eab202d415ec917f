"""The projection head: a linear map that is learned to rank under the noise of its code.

Shapes: N vectors, D dimensions, E dimensions of the map's output.
"""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from index import FaissFit
from retriever import InputError
from retriever.heads import (
    FlatVectors,
    PCAConfig,
    ProductQuantizerConfig,
    Projection,
    ProjectionConfig,
    ResidualQuantizerConfig,
)
from retriever.heads.projection import _closeness, _through_channel, noise_level

D, E = 24, 8
QUANTIZER = ProductQuantizerConfig(num_codebooks=2, codebook_bits=4)
RESIDUAL = ResidualQuantizerConfig(num_codebooks=3, codebook_bits=4, beam=20)
SEEDS = (0, 1, 2)


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def covariance(size: int, seed: int) -> Tensor:
    return rand(3 * size, size, seed=seed).double().T.cov()


def corpus(seed: int) -> tuple[Tensor, Tensor]:
    """Return documents and queries of unit length; queries differ only where documents have least variance."""
    documents, queries = rand(400, D, seed=seed), rand(200, D, seed=seed + 100)
    documents[:, : D // 2] *= 2
    queries[:, : D // 2] = 0
    return normalize(documents, dim=1), normalize(queries, dim=1)


class Recorder:
    """Stands for `_closeness` and keeps the queries that it is given."""

    def __init__(self) -> None:
        self.queries: list[Tensor] = []

    def __call__(self, q: Tensor, x: Tensor) -> Tensor:
        self.queries.append(q.detach().clone())
        return _closeness(q, x)


def started(seed: int, **options: Any) -> Projection:
    settings = {"components": E, "inner": QUANTIZER, "fit_steps": 200, "fit_lr": 5e-3, **options}
    head = ProjectionConfig(**settings).build(D)
    documents, queries = corpus(seed)
    head.warm_start_to_rank(documents, [queries], FaissFit(), seed)
    return head.eval()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("bits", [0.5, 20, 1000])
def test_the_level_is_that_of_the_rate(seed: int, bits: float) -> None:
    found = covariance(5, seed) * 10.0 ** (-3 * seed)
    level = noise_level(found, bits)
    rate = torch.linalg.slogdet(torch.eye(5, dtype=torch.double) + found / level).logabsdet / 2 / math.log(2)
    assert rate.item() == pytest.approx(bits, rel=1e-9)


def test_the_level_of_one_dimension_is_the_variance_over_two_to_twice_the_bits_less_one() -> None:
    assert noise_level(torch.tensor([[3.0]]), 2).item() == pytest.approx(3 / 15, rel=1e-6)


def test_directions_without_variance_cost_no_bits() -> None:
    found = covariance(4, 0)
    wide = torch.zeros(6, 6, dtype=torch.double)
    wide[:4, :4] = found
    assert noise_level(wide, 9).item() == pytest.approx(noise_level(found, 9).item(), rel=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_gradient_of_the_level_is_that_of_finite_differences(seed: int) -> None:
    factor = rand(4, 4, seed=seed).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a: noise_level(a @ a.T, 11), factor)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_channel_leaves_the_error_of_its_rate(seed: int) -> None:
    """What is left of a Gaussian source is C - C (C + level)^-1 C, and not correlated with what comes out."""
    found = covariance(4, seed).float()
    y = rand(200_000, 4, seed=seed) @ torch.linalg.cholesky(found).T
    out = _through_channel(y, found, 7, torch.Generator().manual_seed(seed + 50))
    kept = found @ torch.linalg.solve(found + noise_level(found, 7) * torch.eye(4), found)
    torch.testing.assert_close((y - out).T.cov(), found - kept, rtol=0, atol=0.02 * found.diag().max().item())
    assert ((y - out).T @ out / len(y)).abs().max() < 0.02 * found.diag().max()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_map_keeps_what_queries_ask_for(seed: int) -> None:
    """The ten documents that are nearest to a query, by code beside by vector, with the map and with components."""
    documents, queries = corpus(seed)
    unseen = normalize(
        torch.cat([torch.zeros(100, D // 2), rand(100, D // 2, seed=seed + 200)], dim=1), dim=1
    )
    assert not torch.isin(unseen, queries)[:, D // 2 :].any()
    components = PCAConfig(components=E, inner=QUANTIZER).build(D)
    components.warm_start(documents, FaissFit(), seed)
    exact = (unseen @ documents.T).topk(10).indices
    overlap = {}
    for name, head in {"learned": started(seed, fit_steps=400), "components": components.eval()}.items():
        near = torch.cdist(head.map_queries(unseen), head.decode(head.encode(documents)))
        found = near.topk(10, largest=False).indices
        overlap[name] = (found[:, :, None] == exact[:, None]).any(2).double().mean().item()
    assert overlap["learned"] > overlap["components"] + 0.1


def test_every_kind_of_queries_counts_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten queries of one kind are drawn as often as a thousand of another."""
    monkeypatch.setattr("retriever.heads.projection._closeness", record := Recorder())
    documents, queries = corpus(0)
    few, many = queries[:10], rand(1000, D, seed=9)
    head = ProjectionConfig(components=E, inner=QUANTIZER, fit_steps=3).build(D)
    head.warm_start_to_rank(documents, [few, many], FaissFit(), 0)
    for drawn in record.queries[::2]:  # before the map, and behind it
        own = torch.cdist(drawn, few - head.mean).min(1).values < 1e-2
        assert own.tolist() == [True] * 64 + [False] * 64


@pytest.mark.parametrize("way", ["without steps", "without queries", "with no kind", "with an empty kind"])
def test_what_is_not_learned_are_the_principal_components(way: str) -> None:
    documents, _ = corpus(0)
    expected = PCAConfig(components=E, inner=QUANTIZER).build(D)
    expected.warm_start(documents, FaissFit(), 0)
    head = started(0, fit_steps=0)
    if way != "without steps":
        head = ProjectionConfig(components=E, inner=QUANTIZER).build(D)
        if way == "without queries":
            head.warm_start(documents, FaissFit(), 0)
        else:
            kinds = [torch.zeros(0, D)] if way == "with an empty kind" else []
            head.warm_start_to_rank(documents, kinds, FaissFit(), 0)
    for name, value in expected.state_dict().items():
        assert torch.equal(head.state_dict()[name], value)


def test_the_inner_head_starts_from_the_learned_map() -> None:
    head, (documents, _) = started(0), corpus(0)
    alone = QUANTIZER.build(E)
    alone.warm_start(head.map_queries(documents), FaissFit(), 0)
    assert torch.equal(head.inner.codebooks, alone.codebooks)  # type: ignore[arg-type]


def test_without_an_inner_head_the_map_is_learned_without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retriever.heads.projection._through_channel", None)
    head = started(0, inner=None)
    assert head.export() == FlatVectors(dim=E, metric="l2")
    assert not torch.equal(head.matrix, started(0, inner=None, fit_steps=0).matrix)


def test_a_corpus_of_fewer_directions_than_components_and_many_bits_gives_a_finite_map() -> None:
    documents = torch.zeros(300, D)
    documents[:, :3] = normalize(rand(300, 3, seed=0), dim=1)
    inner = ProductQuantizerConfig(num_codebooks=8, codebook_bits=8, rotation="none")
    head = ProjectionConfig(components=E, inner=inner, fit_steps=20).build(D)
    head.warm_start_to_rank(documents, [documents[:50]], FaissFit(), 0)
    assert head.matrix.isfinite().all()


def test_a_seed_gives_one_map() -> None:
    torch.manual_seed(1)
    first = started(3).matrix
    torch.manual_seed(2)
    assert torch.equal(started(3).matrix, first)
    other = ProjectionConfig(components=E, inner=QUANTIZER, fit_steps=200, fit_lr=5e-3).build(D)
    documents, queries = corpus(3)
    other.warm_start_to_rank(documents, [queries], FaissFit(), 4)
    assert not torch.equal(other.matrix, first)


def test_a_corpus_larger_than_a_step_is_drawn_from(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = started(0).matrix
    monkeypatch.setattr("retriever.heads.projection.DOCUMENTS_AT_ONCE", 50)
    drawn = started(0).matrix
    assert drawn.isfinite().all()
    assert not torch.equal(drawn, whole)


def test_gradient_reaches_towers_and_codewords_and_not_the_map() -> None:
    head, x = started(0), corpus(0)[0].requires_grad_()
    head(x).reconstruction.square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert {name for name, _ in head.named_parameters()} == {"inner.fine.codewords"}


def asked_about(seed: int, documents: Tensor) -> Tensor:
    """Return a query of each document: part of what it says, its own way."""
    turn = torch.linalg.qr(rand(D, D, seed=77)).Q[:, : D // 2]
    return normalize(documents @ turn @ turn.T + 0.1 * rand(len(documents), D, seed=seed + 500), dim=1)


def expecting(seed: int, weight: float) -> Projection:
    head = ProjectionConfig(components=E, inner=RESIDUAL, fit_steps=100, query_weight=weight).build(D)
    documents = corpus(seed)[0]
    head.warm_start_to_rank(documents, [asked_about(seed, documents)], FaissFit(), seed)
    return head.eval()


@pytest.mark.parametrize("seed", SEEDS)
def test_expected_queries_are_the_ridge_regression_of_queries_on_their_nearest_documents(seed: int) -> None:
    head, documents = expecting(seed, 1.0), corpus(seed)[0]
    queries = asked_about(seed, documents)
    nearest = torch.cdist(queries, documents).argmin(1)
    y, u = (head.map_queries(x).double() for x in (documents[nearest], queries))
    strength = (y - y.mean(0)).square().mean().sqrt() * len(y) ** 0.5 * torch.eye(E)
    rows = torch.cat([y - y.mean(0), strength.double()])  # ridge regression as least squares of more rows
    slope = torch.linalg.lstsq(rows, torch.cat([u - u.mean(0), torch.zeros(E, E).double()])).solution
    new = head.map_queries(corpus(seed + 50)[0])
    expected = u.mean(0) + (new - y.mean(0)) @ slope
    torch.testing.assert_close(head._expected_queries(new).double(), expected, rtol=1e-4, atol=1e-5)


def test_every_kind_of_queries_counts_as_much_for_the_expected_query() -> None:
    documents, head = corpus(0)[0], expecting(0, 1.0)
    one, other = asked_about(0, documents), corpus(0)[1]
    for kinds in ([one[:20].repeat(9, 1), other], [one[:20], other.repeat(5, 1)]):
        head.warm_start_to_rank(documents, kinds, FaissFit(), 0)
        middle = torch.stack([head.map_queries(kind).mean(0) for kind in kinds]).mean(0)
        torch.testing.assert_close(head.query_mean, middle, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_chosen_codes_keep_the_place_that_new_documents_have_for_their_queries(seed: int) -> None:
    """Documents and queries are not those of the start; a place is kept if a query comes as much nearer as others."""
    documents = corpus(seed + 1000)[0]
    queries, moved, errors = asked_about(seed + 1000, documents), {}, {}
    for weight in (0.0, 1.0):
        head = expecting(seed, weight)
        u, y, code = (
            head.map_queries(queries),
            head.map_queries(documents),
            head.decode(head.encode(documents)),
        )
        errors[weight] = (y - code).square().sum(1)
        nearer = (u - y).square().sum(1) - (u - code).square().sum(1)
        moved[weight] = (nearer - errors[weight]).square().mean()
    assert moved[1.0] < 0.8 * moved[0.0]
    assert errors[0.0].mean() < errors[1.0].mean() < 1.3 * errors[0.0].mean()


def test_documents_that_are_all_alike_get_the_code_of_their_vector() -> None:
    documents = normalize(rand(1, D, seed=0), dim=1).repeat(400, 1)
    head = ProjectionConfig(components=E, inner=RESIDUAL, fit_steps=0, query_weight=1.0).build(D)
    head.warm_start_to_rank(documents, [corpus(0)[1]], FaissFit(), 0)
    y = head.eval().decode(head.encode(documents))
    torch.testing.assert_close(y, head.map_queries(documents), rtol=0, atol=1e-5)


def test_without_queries_the_chosen_codes_are_the_nearest() -> None:
    documents = corpus(0)[0]
    plain, weighted = (
        ProjectionConfig(components=E, inner=RESIDUAL, query_weight=weight).build(D) for weight in (0.0, 1.0)
    )
    for head in (plain, weighted):
        head.warm_start(documents, FaissFit(), 0)
    assert torch.equal(weighted.eval().encode(documents), plain.eval().encode(documents))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_weight": -1.0, "inner": RESIDUAL}, "query_weight must be at least 0 and finite, got -1.0."),
        ({"query_weight": 1.0}, "query_weight 1.0 is for inner residual quantizers, got inner 'pq'."),
        (
            {"query_weight": 1.0, "inner": None},
            "query_weight 1.0 is for inner residual quantizers, got inner None.",
        ),
        ({"fit_steps": -1}, "fit_steps must be at least 0, got -1."),
        ({"fit_crops_below": -1}, "fit_crops_below must be at least 0, got -1."),
        ({"fit_lr": 0.0}, "fit_lr must be above 0 and finite, got 0.0."),
        ({"fit_temperature": math.inf}, "fit_temperature must be above 0 and finite, got inf."),
        ({"components": D + 1}, f"components must be at most the dimension {D}, got {D + 1}."),
        ({"inner": PCAConfig(components=4)}, "inner must be a head that quantizes, got 'pca'."),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        ProjectionConfig(**{"components": E, "inner": QUANTIZER, **options}).build(D)
