"""Product quantizer: codes, gradients, starting values, upkeep of the codebooks.

Shapes: N vectors, D dimensions, M codebooks, K codewords, S = D // M sub-dimensions.
"""

from __future__ import annotations

import re

import faiss
import numpy as np
import pytest
import torch
from torch import Tensor
from vector_quantize_pytorch import VectorQuantize

from index.clustering import FaissFit
from retriever import InputError
from retriever.heads import (
    CompressionHead,
    ProductQuantizer,
    ProductQuantizerConfig,
    pack_codes,
    unpack_codes,
)
from retriever.heads.estimators import ESTIMATORS

D = 24
SEEDS = (0, 1, 2)
FIT = FaissFit(opq_iterations=2, kmeans_iterations=2)


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


def sub_distances(head: ProductQuantizer, x: Tensor) -> np.ndarray:
    """Return the squared distance of every sub-vector to every codeword, (N, M, K), in float64."""
    codebooks = head.codebooks.detach().double().numpy()
    z = x.double().numpy() @ head.rotation.double().numpy().T
    z = z.reshape(len(x), len(codebooks), -1)
    return ((z[:, :, None, :] - codebooks[None]) ** 2).sum(-1)


def squared_error(head: CompressionHead, x: Tensor) -> float:
    """Return the mean squared error of a vector after encode and decode."""
    with torch.no_grad():
        return (head.decode(head.encode(x)).double() - x.double()).square().sum(1).mean().item()


# --- codes ---


@pytest.mark.parametrize("rotation", ["none", "opq"])
@pytest.mark.parametrize(("num_codebooks", "codebook_bits"), [(1, 6), (4, 4), (6, 8), (24, 3)])
@pytest.mark.parametrize("seed", SEEDS)
def test_codes_are_the_nearest_codewords_of_a_brute_force_search(
    seed: int, num_codebooks: int, codebook_bits: int, rotation: str
) -> None:
    head = make_pq(seed, num_codebooks=num_codebooks, codebook_bits=codebook_bits, rotation=rotation)
    x = rand(100, D, seed=seed + 100)
    distances = sub_distances(head, x)
    chosen = np.take_along_axis(distances, head.encode(x).numpy()[:, :, None], axis=2)[:, :, 0]
    np.testing.assert_allclose(chosen, distances.min(-1), rtol=0, atol=1e-4)  # 1e-4: ties of float32


@pytest.mark.parametrize("codebook_bits", [4, 5, 8])
@pytest.mark.parametrize("seed", SEEDS)
def test_decoded_codes_are_the_vectors_that_faiss_decodes(codebook_bits: int, seed: int) -> None:
    head = make_pq(seed, codebook_bits=codebook_bits)
    pq = faiss.ProductQuantizer(D, 4, codebook_bits)
    faiss.copy_array_to_vector(head.codebooks.detach().numpy().ravel(), pq.centroids)
    codes = head.encode(rand(50, D, seed=seed + 100))
    np.testing.assert_array_equal(
        head.decode(codes).detach().numpy(), pq.decode(pack_codes(codes, codebook_bits))
    )


@pytest.mark.parametrize("codebook_bits", [4, 5, 8])
@pytest.mark.parametrize("seed", SEEDS)
def test_codes_are_those_of_faiss_where_the_choice_is_clear(codebook_bits: int, seed: int) -> None:
    head = make_pq(seed, codebook_bits=codebook_bits)
    pq = faiss.ProductQuantizer(D, 4, codebook_bits)
    faiss.copy_array_to_vector(head.codebooks.detach().numpy().ravel(), pq.centroids)
    x = rand(200, D, seed=seed + 100)
    two = np.sort(sub_distances(head, x), axis=-1)[:, :, :2]
    clear = (two[:, :, 1] - two[:, :, 0]) > 1e-4
    theirs = unpack_codes(pq.compute_codes(x.numpy()), 4, codebook_bits).numpy()
    assert clear.mean() > 0.98
    np.testing.assert_array_equal(head.encode(x).numpy()[clear], theirs[clear])


@pytest.mark.parametrize("seed", SEEDS)
def test_codes_of_one_codebook_are_those_of_vector_quantize_pytorch(seed: int) -> None:
    head = make_pq(seed, dim=6, num_codebooks=1)
    oracle = VectorQuantize(dim=6, codebook_size=16).eval()
    oracle._codebook.embed.data.copy_(head.codebooks.detach())
    x = rand(200, 6, seed=seed + 100)
    _, indices, _ = oracle(x[None])
    assert torch.equal(head.encode(x)[:, 0], indices[0])


def test_codes_do_not_depend_on_how_many_vectors_are_encoded_together() -> None:
    head = make_pq(0)
    x = rand(4097, D, seed=1)  # one more than the head encodes at once
    rows = torch.tensor([0, 4095, 4096])
    assert torch.equal(head.encode(x)[rows], head.encode(x[rows]))


def test_no_vectors_have_no_codes() -> None:
    assert make_pq(0).encode(torch.empty(0, D)).shape == (0, 4)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_codes_under_bfloat16_autocast_are_those_without(estimator: str) -> None:
    head = make_pq(0, estimator=estimator, rotation="opq", codebook_bits=8)
    x = rand(300, D, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        codes = head(x).codes
    assert torch.equal(codes, head(x).codes)


def test_reconstruction_under_bfloat16_autocast_is_that_without() -> None:
    head = make_pq(0, rotation="opq")
    x = rand(50, D, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        reconstruction = head(x).reconstruction
    assert torch.equal(reconstruction, head(x).reconstruction)


def test_encode_under_bfloat16_autocast_gives_the_codes_without() -> None:
    head = make_pq(0, rotation="opq", codebook_bits=8)
    x = rand(300, D, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        codes = head.encode(x)
    assert torch.equal(codes, head.encode(x))


# --- gradients ---


@pytest.mark.parametrize("rotation", ["none", "opq"])
@pytest.mark.parametrize("estimator", ["identity", "codeword"])
def test_gradient_of_the_vectors_is_the_upstream_gradient_behind_any_rotation(
    estimator: str, rotation: str
) -> None:
    head = make_pq(0, estimator=estimator, rotation=rotation)
    x, upstream = rand(20, D, seed=1).requires_grad_(), rand(20, D, seed=2)
    head(x).reconstruction.backward(upstream)
    torch.testing.assert_close(x.grad, upstream, rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_softmax_gradient_of_the_vectors_is_twice_the_covariance_over_the_temperature(
    seed: int, temperature: float
) -> None:
    head = make_pq(seed, estimator="softmax", rotation="opq", selection_temperature=temperature)
    x, upstream = rand(10, D, seed=seed + 100).requires_grad_(), rand(10, D, seed=seed + 200)
    head(x).reconstruction.backward(upstream)
    logits = -sub_distances(head, x.detach()) / temperature
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)  # (N, M, K)
    codebooks = head.codebooks.detach().double().numpy()
    A = head.rotation.double().numpy()
    g = (upstream.double().numpy() @ A.T).reshape(10, 4, -1)
    expected = np.empty_like(g)
    for n, m in np.ndindex(10, 4):
        covariance = np.cov(codebooks[m].T, aweights=p[n, m], bias=True)
        expected[n, m] = 2 * covariance @ g[n, m] / temperature
    np.testing.assert_allclose(x.grad.numpy(), expected.reshape(10, -1) @ A, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rotation", ["none", "opq"])
def test_distortion_gradient_pulls_the_chosen_codewords_to_their_vectors(rotation: str) -> None:
    head = make_pq(0, distortion_weight=0.7, rotation=rotation)
    x = rand(12, D, seed=1)
    output = head(x)
    output.losses["distortion"].backward()
    z = (x @ head.rotation.T).view(12, 4, -1)
    expected = torch.zeros_like(head.codebooks)
    for n in range(12):
        for m in range(4):
            k = output.codes[n, m]
            expected[m, k] += 2 * 0.7 / 12 * (head.codebooks[m, k].detach() - z[n, m])
    torch.testing.assert_close(head.codebooks.grad, expected, rtol=0, atol=1e-5)


def test_distortion_gives_the_vectors_no_gradient() -> None:
    head = make_pq(0, distortion_weight=1.0)
    x = rand(12, D, seed=1).requires_grad_()
    head(x).losses["distortion"].backward()
    assert x.grad is None or not x.grad.any()


@pytest.mark.parametrize("rotation", ["none", "opq"])
def test_commitment_gradient_pulls_the_vectors_to_their_reconstruction(rotation: str) -> None:
    head = make_pq(0, commitment_weight=0.3, rotation=rotation)
    x = rand(12, D, seed=1).requires_grad_()
    head(x).losses["commitment"].backward()
    expected = 2 * 0.3 / 12 * (x - head.decode(head.encode(x))).detach()
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=1e-5)


def test_commitment_gives_the_codebooks_no_gradient() -> None:
    head = make_pq(0, commitment_weight=1.0)
    head(rand(12, D, seed=1).requires_grad_()).losses["commitment"].backward()
    assert head.codebooks.grad is None or not head.codebooks.grad.any()


@pytest.mark.parametrize("name", ["distortion", "commitment"])
def test_auxiliary_loss_is_the_weighted_mean_squared_error_of_a_vector(name: str) -> None:
    head = make_pq(0, rotation="opq", **{f"{name}_weight": 0.7})
    x = rand(50, D, seed=1)
    assert head(x).losses[name].item() == pytest.approx(0.7 * squared_error(head, x), rel=1e-5)


def test_auxiliary_losses_without_weight_are_left_out() -> None:
    assert make_pq(0)(rand(5, D, seed=1)).losses == {}


# --- configuration ---


@pytest.mark.parametrize(("dim", "num_codebooks"), [(30, 4), (32, 5), (384, 100), (7, 16), (8, 3)])
def test_dim_that_the_codebooks_do_not_divide_names_a_number_that_does(dim: int, num_codebooks: int) -> None:
    with pytest.raises(InputError, match=rf"dim={dim} and num_codebooks={num_codebooks}\.") as caught:
        ProductQuantizerConfig(num_codebooks=num_codebooks).build(dim)
    suggestion = int(re.search(r"Try num_codebooks=(\d+)\.", str(caught.value)).group(1))
    distance = abs(suggestion - num_codebooks)
    nearer = range(num_codebooks - distance + 1, num_codebooks + distance)
    assert dim % suggestion == 0
    assert not [m for m in nearer if m > 0 and dim % m == 0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_codebooks", 0),
        ("codebook_bits", 0),
        ("codebook_bits", 17),
        ("rotation", "random"),
        ("estimator", "gumbel"),
        ("metric", "cosine"),
        ("selection_temperature", 0.0),
        ("distortion_weight", -1.0),
        ("commitment_weight", float("nan")),
        ("restart_window", -0.1),
    ],
)
def test_value_outside_its_range_is_refused_by_the_name_of_its_field(field: str, value: object) -> None:
    with pytest.raises(InputError, match=rf"{field} must be .*got "):
        ProductQuantizerConfig(**{field: value})


def test_selection_temperature_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(InputError, match="selection_temperature must be"):
        ProductQuantizerConfig(selection_temperature=float("nan"))


# --- warm start ---


@pytest.mark.parametrize("rotation", ["none", "opq"])
@pytest.mark.parametrize("seed", SEEDS)
def test_warm_start_leaves_less_than_a_fifth_of_the_distortion_of_a_random_start(
    seed: int, rotation: str
) -> None:
    x = torch.nn.functional.normalize(rand(400, D, seed=seed), dim=1)
    head = ProductQuantizerConfig(num_codebooks=4, codebook_bits=4, rotation=rotation).build(D)
    before = squared_error(head, x)
    head.warm_start(x, FaissFit(opq_iterations=2, kmeans_iterations=5), seed)
    assert squared_error(head, x) < 0.2 * before


@pytest.mark.parametrize("seed", SEEDS)
def test_rotation_lowers_the_distortion_of_vectors_with_unequal_subspaces(seed: int) -> None:
    x = rand(500, D, seed=seed) * torch.linspace(3, 0.1, D)
    fit = FaissFit(opq_iterations=4, kmeans_iterations=5)
    heads = {name: make_pq(0, rotation=name) for name in ("none", "opq")}
    for head in heads.values():
        head.warm_start(x, fit, seed)
    assert squared_error(heads["opq"], x) < 0.9 * squared_error(heads["none"], x)


@pytest.mark.parametrize("seed", SEEDS)
def test_rotation_is_orthonormal_after_the_warm_start(seed: int) -> None:
    head = ProductQuantizerConfig(num_codebooks=4, codebook_bits=4).build(D)
    head.warm_start(rand(300, D, seed=seed), FaissFit(opq_iterations=2, kmeans_iterations=2), seed)
    product = head.rotation.double() @ head.rotation.double().T
    torch.testing.assert_close(product, torch.eye(D).double(), rtol=0, atol=1e-5)


def test_opq_warm_start_changes_the_rotation() -> None:
    head = make_pq(0, rotation="opq")
    head.warm_start(rand(300, D, seed=0), FIT, 0)
    start = orthonormal(D, 0)
    assert (head.rotation - start).abs().max() > 0.1


def test_rotation_none_stays_the_identity() -> None:
    head = make_pq(0)
    head.warm_start(rand(300, D, seed=0), FIT, 0)
    assert torch.equal(head.rotation, torch.eye(D))


@pytest.mark.parametrize("rotation", ["none", "opq"])
def test_a_fixed_rotation_is_no_parameter(rotation: str) -> None:
    head = make_pq(0, rotation=rotation, estimator="softmax", distortion_weight=1.0)
    assert [parameter is head.codebooks for parameter in head.parameters()] == [True]


def test_warm_start_from_fewer_vectors_than_codewords_is_refused() -> None:
    head = ProductQuantizerConfig(num_codebooks=4, codebook_bits=4).build(D)
    with pytest.raises(InputError, match=r"at least 16 documents for 4-bit codebooks, got 15\. Raise"):
        head.warm_start(rand(15, D, seed=0), FIT, 0)


def test_warm_start_forgets_the_usage_counts() -> None:
    head = make_pq(0)
    head.count(head.encode(rand(50, D, seed=1)))
    head.warm_start(rand(50, D, seed=1), FIT, 0)
    assert not head.usage.any()


# --- use of the codewords ---


def test_counts_of_several_batches_add_up() -> None:
    head = make_pq(0)
    batches = [head.encode(rand(30, D, seed=seed)) for seed in SEEDS]
    for codes in batches:
        head.count(codes)
    expected = [np.bincount(column, minlength=16) for column in torch.cat(batches).T.numpy()]
    np.testing.assert_array_equal(head.usage.numpy(), expected)


def test_perplexity_of_uniform_use_is_the_number_of_codewords() -> None:
    head = make_pq(0)
    head.count(torch.arange(16).repeat(3)[:, None].expand(-1, 4))
    assert head.usage_statistics() == {"perplexity": pytest.approx(16), "dead_codes": 0.0}


def test_perplexity_of_one_used_codeword_is_one() -> None:
    head = make_pq(0)
    head.count(torch.full((40, 4), 5))
    assert head.usage_statistics() == {"perplexity": pytest.approx(1), "dead_codes": pytest.approx(15 / 16)}


@pytest.mark.parametrize("seed", SEEDS)
def test_perplexity_is_the_exponential_of_the_mean_codebook_entropy(seed: int) -> None:
    head = make_pq(0)
    codes = torch.randint(16, (60, 4), generator=torch.Generator().manual_seed(seed)) % 11
    head.count(codes)
    perplexities = []
    for column in codes.T.numpy():
        p = np.unique(column, return_counts=True)[1] / len(column)
        perplexities.append(np.exp(-(p * np.log(p)).sum()))
    assert head.usage_statistics()["perplexity"] == pytest.approx(np.mean(perplexities), rel=1e-9)


def test_usage_statistics_wait_for_as_many_documents_as_codewords() -> None:
    head = make_pq(0)
    head.count(torch.zeros(15, 4, dtype=torch.int64))
    assert head.usage_statistics() == {}


def use_half(head: ProductQuantizer, documents: int) -> None:
    """Count codes that use the even codewords only."""
    codes = torch.arange(documents) * 2 % head.codebooks.shape[1]
    head.count(codes[:, None].expand(-1, head.num_codes))


def test_restart_replaces_unused_codewords_and_no_others() -> None:
    head = make_pq(0, restart_window=2.0)
    before = head.codebooks.detach().clone()
    use_half(head, 32)
    head.restart_dead_codes(rand(100, D, seed=1), torch.Generator().manual_seed(0))
    changed = (head.codebooks.detach() != before).any(-1)
    assert torch.equal(changed, torch.tensor([False, True]).repeat(4, 8))


@pytest.mark.parametrize("rotation", ["none", "opq"])
def test_restarted_codewords_are_sub_vectors_of_the_rotated_batch(rotation: str) -> None:
    head = make_pq(0, restart_window=2.0, rotation=rotation)
    use_half(head, 32)
    x = rand(100, D, seed=1)
    head.restart_dead_codes(x, torch.Generator().manual_seed(0))
    z = (x.double() @ head.rotation.double().T).view(100, 4, -1)
    restarted = head.codebooks.detach().double()[:, 1::2]  # (M, K / 2, S)
    nearest = (restarted[:, :, None] - z.transpose(0, 1)[:, None]).norm(dim=-1).min(-1).values
    assert nearest.max() < 1e-5


def test_restart_returns_the_mask_of_the_changed_codewords() -> None:
    head = make_pq(0, restart_window=2.0)
    before = head.codebooks.detach().clone()
    use_half(head, 32)
    masks = head.restart_dead_codes(rand(100, D, seed=1), torch.Generator().manual_seed(0))
    assert list(masks) == [head.codebooks]
    assert torch.equal(masks[head.codebooks], (head.codebooks.detach() != before).any(-1))


def test_restart_starts_a_new_window() -> None:
    head = make_pq(0, restart_window=2.0)
    use_half(head, 32)
    head.restart_dead_codes(rand(100, D, seed=1), torch.Generator())
    assert not head.usage.any()


def test_restart_waits_for_a_full_window() -> None:
    head = make_pq(0, restart_window=2.0)
    before = head.codebooks.detach().clone()
    use_half(head, 31)
    assert head.restart_dead_codes(rand(100, D, seed=1), torch.Generator()) == {}
    assert torch.equal(head.codebooks, before)


def test_restart_before_the_window_is_full_keeps_its_counts() -> None:
    head = make_pq(0, restart_window=2.0)
    use_half(head, 31)
    head.restart_dead_codes(rand(100, D, seed=1), torch.Generator())
    assert int(head.usage[0].sum()) == 31


def test_restart_without_unused_codewords_changes_nothing() -> None:
    head = make_pq(0, restart_window=1.0)
    before = head.codebooks.detach().clone()
    head.count(torch.arange(16)[:, None].expand(-1, 4))
    assert head.restart_dead_codes(rand(100, D, seed=1), torch.Generator()) == {}
    assert torch.equal(head.codebooks, before)


def test_restarts_with_one_seed_are_equal() -> None:
    results = []
    for _ in range(2):
        head = make_pq(0, restart_window=2.0)
        use_half(head, 32)
        head.restart_dead_codes(rand(100, D, seed=1), torch.Generator().manual_seed(7))
        results.append(head.codebooks.detach())
    assert torch.equal(*results)


def test_infinite_window_never_restarts() -> None:
    head = make_pq(0, restart_window=float("inf"))
    use_half(head, 10_000)
    assert head.restart_dead_codes(rand(100, D, seed=1), torch.Generator()) == {}
