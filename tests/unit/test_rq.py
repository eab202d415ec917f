"""The residual quantizer, with lists and without: FAISS's codes, vectors and scores; gradients; shorter codes.

Shapes: n vectors, D dimensions, M codebooks, K codewords, J lists.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from torch import Tensor

from index import FaissFit
from index.builders import BUILDERS
from index.parity import prove_parity
from retriever import InputError
from retriever.heads import (
    CompressionHead,
    IVFResidualQuantizer,
    IVFResidualQuantizerConfig,
    ResidualQuantizer,
    ResidualQuantizerConfig,
)
from retriever.heads.residual import Asked, beam_search

D, M, BITS, J, N = 24, 5, 5, 6, 1000
SEEDS = (0, 1, 2)
SIZE: dict[str, Any] = {"num_codebooks": M, "codebook_bits": BITS}


def make_vectors(seed: int, rows: int = N) -> Tensor:
    """Return vectors whose dimensions have unequal spread."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, D, generator=generator) * torch.linspace(2, 0.2, D)


class OnceFit(FaissFit):
    """FAISS's fit, made once for equal arguments: `FaissFit` is the same every time, as is tested below."""

    @staticmethod
    @cache
    def fit(method: str, seed: int, rows: int, options: frozenset[tuple[str, int]]) -> Any:
        return getattr(FaissFit(), method)(make_vectors(seed, rows), seed=seed, **dict(options))

    def additive_codebooks(self, sample: Tensor, *, seed: int, **options: int) -> Tensor:  # type: ignore[override]
        return self.fit("additive_codebooks", seed, len(sample), frozenset(options.items()))

    def coarse_additive_codebooks(
        self, sample: Tensor, *, seed: int, **options: int
    ) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.fit("coarse_additive_codebooks", seed, len(sample), frozenset(options.items()))


def make_rq(seed: int = 0, **options: Any) -> ResidualQuantizer:
    head = ResidualQuantizerConfig(**(SIZE | options)).build(D)
    head.warm_start(make_vectors(seed), OnceFit(), seed)
    return head


def make_ivfrq(seed: int = 0, **options: Any) -> IVFResidualQuantizer:
    head = IVFResidualQuantizerConfig(**(SIZE | {"num_lists": J} | options)).build(D)
    head.warm_start(make_vectors(seed), OnceFit(), seed)
    return head


def faiss_codes(head: ResidualQuantizer, x: Tensor, beam: int) -> Tensor:
    """Return the codes that FAISS's own encoder finds with the head's codebooks."""
    built = faiss.IndexResidualQuantizer(D, M, BITS)
    faiss.copy_array_to_vector(head.codebooks.detach().numpy().ravel(), built.rq.codebooks)
    built.rq.max_beam_size = beam
    built.rq.is_trained = built.is_trained = True
    return head.unpack(built.sa_encode(x.numpy()))


def squared_error(head: CompressionHead, x: Tensor, codes: Tensor) -> float:
    return (head.decode(codes) - x).double().square().sum(1).mean().item()


# --- codes ---


@pytest.mark.parametrize("seed", SEEDS)
def test_greedy_codes_are_those_of_faiss(seed: int) -> None:
    head, x = make_rq(seed, beam=1), make_vectors(seed + 100)
    assert torch.equal(head.encode(x), faiss_codes(head, x, beam=1))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_beam_finds_sums_as_near_as_faisss_beam(seed: int) -> None:
    head, x = make_rq(seed), make_vectors(seed + 100)
    theirs = squared_error(head, x, faiss_codes(head, x, beam=5))
    assert squared_error(head, x, head.encode(x)) == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_beam_finds_nearer_sums_than_the_greedy_choice(seed: int) -> None:
    head, x = make_rq(seed), make_vectors(seed + 100)
    errors = [squared_error(head, x, beam_search(x, head.codebooks, beam)) for beam in (1, 5, 20)]
    assert errors[0] > errors[1] > errors[2]


def test_a_beam_as_wide_as_all_sums_finds_the_nearest_one() -> None:
    head, x = make_rq(num_codebooks=3, codebook_bits=3), make_vectors(100, rows=50)
    words = head.codebooks.detach().double()
    sums = (words[0][:, None, None] + words[1][:, None] + words[2]).view(-1, D)
    nearest = torch.cdist(x.double(), sums).min(1).values.square().mean().item()
    assert squared_error(head, x, beam_search(x, head.codebooks, 512)) == pytest.approx(nearest, rel=1e-5)


def test_a_beam_from_some_lists_finds_the_nearest_sum_in_those_lists() -> None:
    head, x = make_ivfrq(num_codebooks=2, codebook_bits=3, beam=512, list_beam=3), make_vectors(100, rows=50)
    centroids, (first, second) = head.centroids.double(), head.codebooks.detach().double()
    sums = (centroids[:, None, None] + first[:, None] + second).flatten(1, 2)  # (J, K K, D)
    distances = (x.double()[:, None, None] - sums).square().sum(-1)  # (N, J, K K)
    near = torch.cdist(x.double(), centroids).topk(3, largest=False).indices
    expected = distances.amin(2).gather(1, near).amin(1)
    codes = head.encode(x)
    assert (codes[:, :1] == near).any(1).all()
    assert (codes[:, 0] != near[:, 0]).any()
    torch.testing.assert_close(
        (x - head.decode(codes)).square().sum(1).double(), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_a_beam_from_some_lists_finds_nearer_sums_than_from_the_nearest_list(seed: int) -> None:
    x = make_vectors(seed + 100)
    one, some = (
        squared_error(head, x, head.encode(x)) for head in (make_ivfrq(seed), make_ivfrq(seed, list_beam=4))
    )
    assert some < one


def test_a_beam_of_more_lists_than_there_are_begins_with_all() -> None:
    x = make_vectors(100)
    assert torch.equal(make_ivfrq(list_beam=J + 1).encode(x), make_ivfrq(list_beam=J).encode(x))


def test_codes_in_training_are_those_of_encoding_with_lists_of_a_beam() -> None:
    head, x = make_ivfrq(list_beam=3), make_vectors(100)
    assert torch.equal(head(x).codes, head.encode(x))
    torch.testing.assert_close(head(x).reconstruction, head.decode(head.encode(x)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"list_beam": 0}, r"list_beam must be at least 1, which is the nearest list, got 0"),
        (
            {"list_beam": 2, "list_assignment": "frozen"},
            r"list_beam 2 chooses among current centroids.*frozen",
        ),
        (
            {"list_beam": 2, "list_structure": "no_imi"},
            r"list_beam 2 chooses among current centroids.*no_imi",
        ),
    ],
)
def test_a_beam_of_lists_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        IVFResidualQuantizerConfig(**options)


@pytest.mark.parametrize("beam", [1, 5])
def test_codes_of_vectors_far_from_the_origin_are_those_of_float64(beam: int) -> None:
    """||r||^2 and 2 r . c are a thousand times their difference here."""
    words = make_rq().codebooks.detach().clone()
    words[0] += 30
    x = make_vectors(100) + 30
    exact = beam_search(x.double(), words.double(), beam)
    assert (beam_search(x, words, beam) == exact).double().mean() > 0.9995


def test_codes_do_not_depend_on_the_rows_worked_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    head, x = make_rq(), make_vectors(100)
    whole = head.encode(x)
    monkeypatch.setattr("retriever.heads.residual.TABLE", 5 * 2**BITS * 7)
    assert torch.equal(head.encode(x), whole)


def make_asked(seed: int, weight: float, rows: int) -> Asked:
    return Asked(make_vectors(seed, rows) / 2, torch.tensor(weight))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("make", [make_rq, make_ivfrq])
def test_a_beam_as_wide_as_all_sums_finds_the_one_of_least_cost_for_the_expected_query(
    make: Any, seed: int
) -> None:
    lists = {"list_beam": J} if make is make_ivfrq else {}
    head = make(seed, num_codebooks=2, codebook_bits=4, beam=512, **lists)
    x, asked = make_vectors(seed + 100, rows=50), make_asked(seed + 200, 0.3, 50)
    first, second = head.codebooks.detach().double()
    sums = (first[:, None] + second).view(-1, D)
    if lists:
        sums = (head.centroids.detach().double()[:, None] + sums).view(-1, D)
    query = (x + asked.offset).double()
    errors = (x.double()[:, None] - sums).square().sum(2)
    nearer = (query - x).square().sum(1)[:, None] - torch.cdist(query, sums).square()  # brought by the code
    costs = errors + 0.3 * (nearer - errors).square()
    codes = head.encode(x, asked)
    assert not torch.equal(codes, head.encode(x))
    chosen = torch.cdist(head.decode(codes).double(), sums).argmin(1)
    torch.testing.assert_close(costs.gather(1, chosen[:, None])[:, 0], costs.amin(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [make_rq, make_ivfrq])
def test_an_expected_query_of_no_weight_changes_no_code(make: Any) -> None:
    head, x = make(), make_vectors(100)
    assert torch.equal(head.encode(x, make_asked(200, 0.0, N)), head.encode(x))


@pytest.mark.parametrize("make", [make_rq, make_ivfrq])
def test_codes_for_expected_queries_do_not_depend_on_the_rows_worked_on_at_once(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, x, asked = make(), make_vectors(100), make_asked(200, 0.3, N)
    whole = head.encode(x, asked)
    monkeypatch.setattr("retriever.heads.residual.TABLE", 5 * 2**BITS * 7)
    monkeypatch.setattr("retriever.heads.ivfrq.ROWS_AT_ONCE", 70)
    assert torch.equal(head.encode(x, asked), whole)


def test_no_vectors_have_no_codes() -> None:
    assert make_rq().encode(torch.empty(0, D)).shape == (0, M)


@pytest.mark.parametrize("make", [make_rq, make_ivfrq])
def test_the_beam_of_evaluation_is_that_outside_training(make: Any) -> None:
    head, x = make(eval_beam=20), make_vectors(100)
    fixed = [make(beam=beam) for beam in (5, 20)]
    for other in fixed:
        other.load_state_dict(head.state_dict())
    narrow, wide = (other.encode(x) for other in fixed)
    assert not torch.equal(narrow, wide)
    for training, expected in ((True, narrow), (False, wide)):
        head.train(training)
        assert torch.equal(head.encode(x), expected)
        assert torch.equal(head(x).codes, expected)


@pytest.mark.parametrize("name", ["beam", "eval_beam"])
def test_a_beam_below_one_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"{name} must be at least 1, which is greedy, got 0"):
        ResidualQuantizerConfig(**{name: 0})


# --- FAISS ---


def test_decoded_vectors_are_those_of_faiss() -> None:
    head, x = make_rq(), make_vectors(100)
    packed = head.pack(head.encode(x))
    built = BUILDERS["rq"]().build(make_rq(metric="inner_product").export(), packed[:1])
    np.testing.assert_allclose(
        built.sa_decode(packed), head.decode(head.encode(x)).detach(), rtol=0, atol=1e-6
    )


def test_decoded_vectors_in_lists_are_those_of_faiss() -> None:
    head, x = make_ivfrq(metric="inner_product"), make_vectors(100)
    packed = head.pack(head.encode(x))
    built = BUILDERS["ivfrq"]().build(head.export(), packed[:1])
    np.testing.assert_allclose(
        built.sa_decode(packed), head.decode(head.encode(x)).detach(), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    ("kind", "make", "options"),
    [
        ("rq", make_rq, {}),
        ("rq", make_rq, {"metric": "inner_product"}),
        ("rq_fastscan", make_rq, {"metric": "inner_product", "codebook_bits": 4, "num_codebooks": 8}),
        ("ivfrq", make_ivfrq, {}),
        ("ivfrq", make_ivfrq, {"metric": "inner_product"}),
        ("ivfrq", make_ivfrq, {"list_beam": 4}),
        ("ivfrq_fastscan", make_ivfrq, {"metric": "inner_product", "codebook_bits": 4, "num_codebooks": 8}),
    ],
)
def test_every_form_keeps_its_promise_for_the_heads_codes(kind: str, make: Any, options: Any) -> None:
    """An exact form: every score within 1e-5 of the largest; FastScan: the overlap that it states."""
    head, x = make(**options), make_vectors(100)
    codes, builder = head.pack(head.encode(x)), BUILDERS[kind]()
    built = builder.build(head.export(), codes)
    if hasattr(built, "nprobe"):
        built.nprobe = J
    prove_parity(builder, built, head, codes, make_vectors(200, rows=60))


# --- gradients ---


def gradients(
    head: ResidualQuantizer | IVFResidualQuantizer, x: Tensor, upstream: Tensor
) -> dict[str, Tensor]:
    """Return the gradients that a gradient of the reconstruction makes."""
    x = x.clone().requires_grad_()
    head(x).reconstruction.backward(upstream)
    found = {"x": x.grad, "codebooks": head.codebooks.grad}
    if isinstance(head, IVFResidualQuantizer):
        found["centroids"] = head.coarse.codewords.grad
    return {name: torch.zeros(()) if value is None else value for name, value in found.items()}


def scattered(codes: Tensor, upstream: Tensor, size: int) -> Tensor:
    """Return for each codeword the sum of the gradients of the vectors that chose it, (M, K, D)."""
    hard = torch.nn.functional.one_hot(codes, size).to(upstream.dtype)
    return torch.einsum("nmk,nd->mkd", hard, upstream)


@pytest.mark.parametrize("make", [make_rq, make_ivfrq])
def test_identity_passes_the_gradient_to_the_vectors_alone(make: Any) -> None:
    x, upstream = make_vectors(100, rows=40), make_vectors(200, rows=40)
    found = gradients(make(estimator="identity"), x, upstream)
    torch.testing.assert_close(found.pop("x"), upstream)
    assert all(not value.any() for value in found.values())


@pytest.mark.parametrize("make", [make_rq, make_ivfrq, partial(make_ivfrq, list_beam=3)])
def test_codeword_passes_the_gradient_once_to_vectors_and_to_each_chosen_codeword(make: Any) -> None:
    x, upstream = make_vectors(100, rows=40), make_vectors(200, rows=40)
    head = make(estimator="codeword")
    codes, found = head.encode(x), gradients(head, x, upstream)
    torch.testing.assert_close(found["x"], upstream)
    torch.testing.assert_close(found["codebooks"], scattered(codes[:, -M:], upstream, 2**BITS))
    if "centroids" in found:
        torch.testing.assert_close(found["centroids"], scattered(codes[:, :1], upstream, J))


def test_softmax_passes_to_the_vectors_the_sum_of_the_steps_covariances() -> None:
    """d x_hat / d x = sum_m 2 Cov_p(c_m) / temperature, p the softmax over -||residual - c||^2 / temperature."""
    head = make_rq(estimator="softmax", selection_temperature=2.0)
    x, upstream = make_vectors(100, rows=20), make_vectors(200, rows=20)
    codes, words = head.encode(x), head.codebooks.detach().double()
    rest, expected = x.double(), torch.zeros(20, D, dtype=torch.float64)
    for m in range(M):
        p = (-torch.cdist(rest, words[m]).square() / 2.0).softmax(1)
        mean = p @ words[m]
        moments = torch.einsum("nk,kd,ke->nde", p, words[m], words[m])
        covariance = moments - mean[:, :, None] * mean[:, None]
        expected += 2 / 2.0 * torch.einsum("nde,ne->nd", covariance, upstream.double())
        rest = rest - words[m, codes[:, m]]
    torch.testing.assert_close(gradients(head, x, upstream)["x"].double(), expected, rtol=1e-4, atol=1e-5)


def test_softmax_gives_the_log_probability_of_the_codes() -> None:
    head, x = make_rq(estimator="softmax"), make_vectors(100, rows=20)
    codes, rest, expected = head.encode(x), x.double(), torch.zeros(20, dtype=torch.float64)
    for m, words in enumerate(head.codebooks.detach().double()):
        log_p = (-torch.cdist(rest, words).square()).log_softmax(1)
        expected += log_p[torch.arange(20), codes[:, m]]
        rest = rest - words[codes[:, m]]
    torch.testing.assert_close(head(x).log_assignment.double(), expected, rtol=1e-4, atol=1e-4)


# --- losses of the head ---


@pytest.mark.parametrize("steps", ["last", "all"])
@pytest.mark.parametrize("make", [make_rq, make_ivfrq])
def test_distortion_is_the_weighted_error_of_the_sums_it_sees(make: Any, steps: str) -> None:
    head, x = make(distortion_weight=0.5, distortion_steps=steps), make_vectors(100)
    words = head.fine.select(head.encode(x)[:, -M:]).double()
    base = head.centroids[head.encode(x)[:, 0]].double() if make is make_ivfrq else 0
    sums = [base + words[:, : m + 1].sum(1) for m in range(M)]
    errors = [(x.double() - each).square().sum(1).mean().item() for each in sums]
    expected = 0.5 * (sum(errors) if steps == "all" else errors[-1])
    assert head(x).losses["distortion"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("make", [make_rq, make_ivfrq])
def test_commitment_moves_the_vectors_to_the_reconstruction_and_nothing_else(make: Any) -> None:
    head, x = make(commitment_weight=0.5), make_vectors(100).requires_grad_()
    head(x).losses["commitment"].backward()
    expected = 0.5 * 2 * (x - head.decode(head.encode(x))) / N
    torch.testing.assert_close(x.grad, expected.detach(), rtol=1e-4, atol=1e-7)
    assert all(parameter.grad is None for parameter in head.parameters())


@pytest.mark.parametrize("make", [make_rq, make_ivfrq])
def test_descent_on_the_distortion_lowers_the_error_of_new_vectors(make: Any) -> None:
    head = make(distortion_weight=1.0)
    with torch.no_grad():  # a start that can be bettered
        head.codebooks.mul_(0.6)
    fresh = make_vectors(300)
    before = squared_error(head, fresh, head.encode(fresh))
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    for step in range(30):
        optimizer.zero_grad()
        head(make_vectors(step + 400, rows=300)).losses["distortion"].backward()
        optimizer.step()
    assert squared_error(head, fresh, head.encode(fresh)) < 0.9 * before


# --- shorter codes ---


@pytest.mark.parametrize("length", [1, 3, M])
def test_the_first_codes_decode_in_a_truncated_head_to_the_first_sums(length: int) -> None:
    head, x = make_rq(), make_vectors(100)
    codes = head.encode(x)
    torch.testing.assert_close(
        head.truncated(length).decode(codes[:, :length]), head.fine.select(codes)[:, :length].sum(1)
    )


@pytest.mark.parametrize("length", [1, 3, M])
def test_the_first_greedy_codes_are_those_that_a_truncated_head_chooses(length: int) -> None:
    head, x = make_rq(beam=1), make_vectors(100)
    assert torch.equal(head.truncated(length).encode(x), head.encode(x)[:, :length])


def test_a_truncated_head_is_carried_by_an_index() -> None:
    head, x = make_rq(), make_vectors(100)
    short = head.truncated(3)
    codes = short.pack(head.encode(x)[:, :3])
    prove_parity(
        BUILDERS["rq"](), BUILDERS["rq"]().build(short.export(), codes), short, codes, make_vectors(200, 60)
    )


@pytest.mark.parametrize("length", [0, M + 1])
def test_a_truncation_to_codebooks_that_are_not_there_is_refused(length: int) -> None:
    with pytest.raises(InputError, match=rf"between 1 and {M}, those of the head, got {length}"):
        make_rq().truncated(length)


# --- start, use and restart ---


def test_the_start_is_as_good_as_the_quantizer_of_the_faiss_factory() -> None:
    head, x = make_rq(), make_vectors(0)
    theirs = faiss.index_factory(D, f"RQ{M}x{BITS}")
    theirs.train(x.numpy())
    error = np.square(theirs.sa_decode(theirs.sa_encode(x.numpy())) - x.numpy()).sum(1).mean()
    assert squared_error(head, x, head.encode(x)) <= 1.03 * error


def test_the_start_with_lists_leaves_less_than_the_one_without() -> None:
    x = make_vectors(0)
    errors = [squared_error(head, x, head.encode(x)) for head in (make_rq(), make_ivfrq())]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("config", [ResidualQuantizerConfig, IVFResidualQuantizerConfig])
def test_starts_with_one_seed_are_equal(config: Any) -> None:
    options = {"num_lists": J} if config is IVFResidualQuantizerConfig else {}
    first, second = (config(num_codebooks=2, codebook_bits=4, **options).build(D) for _ in range(2))
    for head in (first, second):
        head.warm_start(make_vectors(3), FaissFit(), 3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    ("make", "rows", "fault"),
    [
        (make_rq, 31, "at least 32 documents for 5-bit"),
        (make_ivfrq, 39, "at least 40 documents for num_lists=40"),
    ],
)
def test_a_sample_that_is_too_small_is_refused(make: Any, rows: int, fault: str) -> None:
    head = make(**({"num_lists": 40, "num_codebooks": 1} if make is make_ivfrq else {}))
    with pytest.raises(InputError, match=fault):
        head.warm_start(make_vectors(0, rows=rows), FaissFit(), 0)


@pytest.mark.parametrize("make", [make_rq, make_ivfrq])
def test_an_unused_codeword_becomes_a_residual_of_its_step(make: Any) -> None:
    head, x = make(restart_window=1.0), make_vectors(100, rows=200)
    codes = head.encode(x)
    codes[:, 2 - M][codes[:, 2 - M] == 7] = 6  # the third codebook does not use codeword 7
    head.count(codes)
    words = head.fine.select(head.encode(x)[:, -M:])
    start = head.centroids[head.encode(x)[:, 0]] if make is make_ivfrq else 0
    steps = (x - start - words[:, :2].sum(1)).detach()
    masks = head.restart_dead_codes(x, torch.Generator().manual_seed(0))
    assert bool(masks[head.codebooks][2, 7])
    assert (steps - head.codebooks[2, 7]).abs().sum(1).min() < 1e-5


def test_lists_of_the_start_stay_when_centroids_move_only_if_they_are_frozen() -> None:
    x = make_vectors(100)
    for assignment, kept in (("live", False), ("frozen", True)):
        head = make_ivfrq(list_assignment=assignment)
        before = head.encode(x)[:, 0]
        with torch.no_grad():
            head.coarse.codewords.copy_(head.coarse.codewords.flip(1))
        assert torch.equal(head.encode(x)[:, 0], before) == kept


def test_usage_is_that_of_codewords_and_lists() -> None:
    head = make_ivfrq()
    head.count(head.encode(make_vectors(0)))
    found = head.usage_statistics()
    assert 1 < found["list_perplexity"] <= J
    assert 1 < found["perplexity"] <= 2**BITS
