"""Learned inverted file: codes, bytes, gradients under each estimator, frozen assignments, starting values.

Oracles are loops in float64 written from Poeem, MoPQ and Distill-VQ, and FAISS.

Shapes: N vectors, D dimensions, J lists, M codebooks, K codewords, S = D // M sub-dimensions.
"""

from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch
from torch import Tensor

from index import FaissFit
from retriever import InputError
from retriever.heads import (
    CompressionHead,
    IVFProductQuantizer,
    IVFProductQuantizerConfig,
    ProductQuantizerConfig,
)

D, J, M, K, N = 12, 5, 3, 8, 40
S = D // M
SEEDS = (0, 1, 2)
ESTIMATORS = ("identity", "codeword", "softmax")
LEARNED = ("givens_greedy", "cayley", "free")
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthonormal(seed: int) -> Tensor:
    return torch.linalg.qr(rand(D, D, seed=seed)).Q


def make_head(seed: int = 0, **options: object) -> IVFProductQuantizer:
    """Return a head with random centroids and codebooks and, unless "none", a random rotation."""
    options = {"num_lists": J, "num_codebooks": M, "codebook_bits": 3, "rotation": "none"} | options
    head = IVFProductQuantizerConfig(**options).build(D)
    head.coarse.start(rand(1, head.config.num_lists, D, seed=seed))
    head.fine.start(0.5 * rand(*head.fine.codewords.shape, seed=seed + 1))
    if head.config.rotation != "none":
        head.rotate.start(orthonormal(seed))
    return head


def make_plain(seed: int = 0, **options: object) -> CompressionHead:
    """Return a head without lists."""
    head = ProductQuantizerConfig(
        **({"num_codebooks": M, "codebook_bits": 3, "rotation": "none"} | options)
    ).build(D)
    head.fine.start(0.5 * rand(M, K, S, seed=seed + 1))
    if head.config.rotation != "none":
        head.rotate.start(orthonormal(seed))
    return head


def arrays(head: IVFProductQuantizer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rotation, centroids and codebooks in float64."""
    parts = (head.rotation, head.centroids, head.fine.codewords)
    return tuple(part.detach().double().numpy() for part in parts)


def move(head: IVFProductQuantizer) -> None:
    """Change centroids and codewords as training would, only more."""
    with torch.no_grad():
        head.coarse.codewords.add_(rand(*head.coarse.codewords.shape, seed=77))
        head.fine.codewords.add_(rand(*head.fine.codewords.shape, seed=78))


# --- codes ---


@pytest.mark.parametrize("rotation", ["none", "opq", "free"])
@pytest.mark.parametrize("seed", SEEDS)
def test_codes_are_those_of_a_brute_force_search(seed: int, rotation: str) -> None:
    """The nearest centroid, then the nearest codeword of every part of the residual."""
    head, x = make_head(seed, rotation=rotation, metric="inner_product"), rand(N, D, seed=seed + 100)
    A, centroids, codebooks = arrays(head)
    z = x.double().numpy() @ A.T
    for row, codes in zip(z, head.encode(x).numpy(), strict=True):
        distances = ((row - centroids) ** 2).sum(1)
        assert distances[codes[0]] == pytest.approx(distances.min(), abs=1e-4)
        residual = (row - centroids[codes[0]]).reshape(M, S)
        for m in range(M):
            distances = ((residual[m] - codebooks[m]) ** 2).sum(1)
            assert distances[codes[1 + m]] == pytest.approx(distances.min(), abs=1e-4)


@pytest.mark.parametrize("rotation", ["none", "opq"])
@pytest.mark.parametrize("seed", SEEDS)
def test_decoded_is_centroid_plus_codewords_rotated_back(seed: int, rotation: str) -> None:
    head = make_head(seed, rotation=rotation)
    codes = head.encode(rand(N, D, seed=seed + 100))
    A, centroids, codebooks = arrays(head)
    parts = [np.concatenate([codebooks[m, row[1 + m]] for m in range(M)]) for row in codes.numpy()]
    expected = np.linalg.solve(A, (centroids[codes[:, 0]] + np.stack(parts)).T).T
    np.testing.assert_allclose(head.decode(codes).detach().numpy(), expected, rtol=0, atol=1e-5)


def test_one_list_at_the_origin_is_a_plain_product_quantizer() -> None:
    head, plain = make_head(num_lists=1), make_plain()
    with torch.no_grad():
        head.coarse.codewords.zero_()
    x = rand(N, D, seed=5)
    assert torch.equal(head.encode(x)[:, 1:], plain.encode(x))


@pytest.mark.parametrize("bits", [3, 4, 8, 10])
@pytest.mark.parametrize("num_lists", [1, 2, 256, 257, 70_000])
def test_packed_codes_are_unpacked_as_they_were(num_lists: int, bits: int) -> None:
    head = make_head(num_lists=num_lists, codebook_bits=bits)
    generator = torch.Generator().manual_seed(num_lists)
    lists = torch.randint(num_lists, (N, 1), generator=generator)
    lists[:2, 0] = torch.tensor([0, num_lists - 1])
    codes = torch.cat([lists, torch.randint(2**bits, (N, M), generator=generator)], 1)
    assert torch.equal(head.unpack(head.pack(codes)), codes)


@pytest.mark.parametrize("bits", [3, 8, 10])
@pytest.mark.parametrize("num_lists", [1, 2, 256, 257, 70_000])
def test_packed_rows_are_as_long_as_faiss_counts_them(num_lists: int, bits: int) -> None:
    head = make_head(num_lists=num_lists, codebook_bits=bits)
    theirs = faiss.IndexIVFPQ(faiss.IndexFlatL2(D), D, num_lists, M, bits)
    assert head.pack(torch.zeros(2, 1 + M, dtype=torch.int64)).shape == (2, head.code_size)
    assert head.code_size == theirs.sa_code_size()


def test_codes_do_not_depend_on_how_many_vectors_are_encoded_together() -> None:
    head, x = make_head(), rand(4097, D, seed=1)  # one more than the head encodes at once
    rows = torch.tensor([0, 4095, 4096])
    assert torch.equal(head.encode(x)[rows], head.encode(x[rows]))


def test_no_vectors_have_no_codes() -> None:
    assert make_head().encode(torch.empty(0, D)).shape == (0, 1 + M)


@every_estimator
def test_codes_and_vectors_under_bfloat16_autocast_are_those_without(estimator: str) -> None:
    head, x = make_head(estimator=estimator, rotation="opq"), rand(200, D, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        output = head(x)
    assert torch.equal(output.codes, head(x).codes)
    assert torch.equal(output.reconstruction, head(x).reconstruction)


@every_estimator
def test_coarse_part_of_the_output_is_the_centroid_rotated_back(estimator: str) -> None:
    head, x = make_head(estimator=estimator, rotation="opq"), rand(N, D, seed=1)
    output = head(x)
    A, centroids, _ = arrays(head)
    np.testing.assert_allclose(
        output.coarse.detach().numpy(), centroids[output.codes[:, 0]] @ A, rtol=0, atol=1e-5
    )


# --- gradients of the retrieval loss ---


@pytest.mark.parametrize("rotation", ["none", "opq", "givens_greedy", "cayley"])
@pytest.mark.parametrize("make", [make_head, make_plain], ids=["ivfpq", "pq"])
def test_identity_passes_every_direction_on_unchanged(make: object, rotation: str) -> None:
    """Poeem: the Jacobian of the reconstruction by the vector is the identity matrix."""
    head = make(estimator="identity", rotation=rotation, distortion_weight=1.0)
    x = rand(3, D, seed=1)
    jacobian = torch.autograd.functional.jacobian(lambda x: head(x).reconstruction, x)
    expected = torch.eye(3 * D).view(3, D, 3, D)
    torch.testing.assert_close(jacobian, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rotation", ["none", *LEARNED])
@pytest.mark.parametrize("make", [make_head, make_plain], ids=["ivfpq", "pq"])
def test_identity_gives_no_parameter_of_the_head_a_gradient(make: object, rotation: str) -> None:
    head = make(estimator="identity", rotation=rotation, distortion_weight=1.0, metric="inner_product")
    output = head(rand(N, D, seed=1).requires_grad_())
    output.reconstruction.backward(rand(N, D, seed=2), retain_graph=True)
    if output.coarse is not None:
        output.coarse.backward(rand(N, D, seed=3))
    moved = {name: p.grad.abs().max().item() for name, p in head.named_parameters() if p.grad is not None}
    assert all(value < 1e-5 for value in moved.values()), moved


@pytest.mark.parametrize("rotation", ["none", "opq"])
@pytest.mark.parametrize("seed", SEEDS)
def test_codeword_gives_a_centroid_the_upstream_gradients_of_its_list(seed: int, rotation: str) -> None:
    head = make_head(seed, estimator="codeword", rotation=rotation)
    x, upstream = rand(N, D, seed=seed + 100), rand(N, D, seed=seed + 200)
    output = head(x)
    output.reconstruction.backward(upstream)
    A = arrays(head)[0]
    expected = np.zeros((J, D))
    for number, gradient in zip(output.codes[:, 0], upstream.double().numpy() @ A.T, strict=True):
        expected[number] += gradient
    np.testing.assert_allclose(head.coarse.codewords.grad[0].numpy(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_codeword_gives_a_codeword_the_upstream_gradients_of_its_vectors(seed: int) -> None:
    head = make_head(seed, estimator="codeword")
    x, upstream = rand(N, D, seed=seed + 100), rand(N, D, seed=seed + 200)
    output = head(x)
    output.reconstruction.backward(upstream)
    expected = torch.zeros(M, K, S)
    for n, m in np.ndindex(N, M):
        expected[m, output.codes[n, 1 + m]] += upstream.view(N, M, S)[n, m]
    torch.testing.assert_close(head.fine.codewords.grad, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rotation", ["none", "opq"])
def test_codeword_gives_the_vectors_the_upstream_gradient_once(rotation: str) -> None:
    head = make_head(estimator="codeword", rotation=rotation)
    x, upstream = rand(N, D, seed=1).requires_grad_(), rand(N, D, seed=2)
    head(x).reconstruction.backward(upstream)
    torch.testing.assert_close(x.grad, upstream, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["x", "centroids", "codebooks"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_softmax_gradients_are_those_of_the_written_formula(seed: int, temperature: float, name: str) -> None:
    """Autograd in float64 of v_a + sum_k w_k c_k, w = onehot + p - sg(p), p = softmax(-|z - v_a - c|^2 / t)."""
    head = make_head(seed, estimator="softmax", selection_temperature=temperature)
    x, upstream = rand(N, D, seed=seed + 100).requires_grad_(), rand(N, D, seed=seed + 200)
    output = head(x)
    output.reconstruction.backward(upstream)
    leaves = {
        "x": x.detach().double().requires_grad_(),
        "centroids": head.centroids.detach().double().requires_grad_(),
        "codebooks": head.fine.codewords.detach().double().requires_grad_(),
    }
    total = torch.zeros((), dtype=torch.float64)
    for n in range(N):
        centroid = leaves["centroids"][output.codes[n, 0]]
        residual = (leaves["x"][n] - centroid).view(M, S)
        chosen = []
        for m in range(M):
            book = leaves["codebooks"][m]
            p = (-(residual[m] - book).square().sum(1) / temperature).softmax(0)
            hard = torch.eye(K, dtype=torch.float64)[output.codes[n, 1 + m]]
            chosen.append((hard + p - p.detach()) @ book)
        total = total + (centroid + torch.cat(chosen)) @ upstream[n].double()
    total.backward()
    found = {"x": x.grad, "centroids": head.coarse.codewords.grad, "codebooks": head.fine.codewords.grad}
    np.testing.assert_allclose(
        found[name].numpy().reshape(leaves[name].shape), leaves[name].grad.numpy(), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("estimator", ["codeword", "softmax"])
def test_scores_of_the_lists_give_their_centroids_the_direct_gradient(estimator: str) -> None:
    """Distill-VQ's second score, q . o."""
    head, upstream = make_head(estimator=estimator), rand(N, D, seed=2)
    output = head(rand(N, D, seed=1))
    output.coarse.backward(upstream)
    expected = torch.zeros(J, D).index_add(0, output.codes[:, 0], upstream)
    torch.testing.assert_close(head.coarse.codewords.grad[0], expected, rtol=0, atol=1e-4)
    assert head.fine.codewords.grad is None


# --- distortion ---


def distortion_gradients(
    head: CompressionHead, x: Tensor, weight: float, reduction: str
) -> dict[str, np.ndarray]:
    """Gradients of weight * sum or mean of ||v_a + c - A x||^2, in float64."""
    A = head.rotation.detach().double().numpy()
    books = head.fine.codewords.detach().double().numpy()
    codes = head.encode(x).numpy()
    lists = codes[:, 0] if isinstance(head, IVFProductQuantizer) else None
    fine = codes[:, 1:] if lists is not None else codes
    factor = 2 * weight / (len(x) if reduction == "mean" else 1)
    found = {"books": np.zeros_like(books), "centroids": np.zeros((J, D)), "A": np.zeros((D, D))}
    for n, row in enumerate(x.double().numpy()):
        whole = np.concatenate([books[m, fine[n, m]] for m in range(M)])
        if lists is not None:
            whole = whole + head.centroids.detach().double().numpy()[lists[n]]
        error = factor * (whole - A @ row)
        for m in range(M):
            found["books"][m, fine[n, m]] += error.reshape(M, S)[m]
        if lists is not None:
            found["centroids"][lists[n]] += error
        found["A"] -= np.outer(error, row)
    return found


@pytest.mark.parametrize("rotation", ["none", "givens_greedy", "free"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("make", [make_head, make_plain], ids=["ivfpq", "pq"])
@pytest.mark.parametrize("seed", SEEDS)
def test_distortion_gradients_are_those_of_the_formula(
    make: object, reduction: str, rotation: str, seed: int
) -> None:
    options = {"rotation": rotation, "metric": "inner_product", "estimator": "identity"}
    head = make(seed, distortion_weight=0.7, distortion_reduction=reduction, **options)
    x = rand(N, D, seed=seed + 100)
    head(x).losses["distortion"].backward()
    expected = distortion_gradients(head, x, 0.7, reduction)
    np.testing.assert_allclose(head.fine.codewords.grad.numpy(), expected["books"], rtol=1e-4, atol=1e-4)
    if isinstance(head, IVFProductQuantizer):
        np.testing.assert_allclose(head.coarse.codewords.grad[0], expected["centroids"], rtol=1e-4, atol=1e-4)
    if rotation != "none":
        np.testing.assert_allclose(head.rotate.values.grad.numpy(), expected["A"], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("make", [make_head, make_plain], ids=["ivfpq", "pq"])
def test_sum_of_the_distortion_is_the_mean_times_the_vectors(make: object) -> None:
    x = rand(N, D, seed=1)
    values = [
        make(distortion_weight=0.7, distortion_reduction=name)(x).losses["distortion"].item()
        for name in ("sum", "mean")
    ]
    assert values[0] == pytest.approx(N * values[1], rel=1e-5)


@pytest.mark.parametrize("rotation", ["none", "cayley"])
@every_estimator
def test_distortion_gives_the_vectors_no_gradient(estimator: str, rotation: str) -> None:
    head, x = make_head(estimator=estimator, rotation=rotation, distortion_weight=1.0), rand(N, D, seed=1)
    x.requires_grad_()
    head(x).losses["distortion"].backward()
    assert x.grad is None or not x.grad.any()


@pytest.mark.parametrize("rotation", ["none", "opq"])
def test_commitment_pulls_the_vectors_to_their_reconstruction_and_nothing_else(rotation: str) -> None:
    head, x = make_head(rotation=rotation, commitment_weight=0.3), rand(N, D, seed=1).requires_grad_()
    head(x).losses["commitment"].backward()
    expected = 2 * 0.3 / N * (x - head.decode(head.encode(x))).detach()
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=1e-5)
    assert all(p.grad is None or not p.grad.any() for p in head.parameters())


# --- frozen assignments ---


@pytest.mark.parametrize("assignment", ["frozen", "frozen_in_training"])
def test_frozen_lists_do_not_move_in_training_when_centroids_do(assignment: str) -> None:
    head, x = make_head(list_assignment=assignment), rand(N, D, seed=1)
    before = head(x).codes[:, 0]
    move(head)
    assert torch.equal(head(x).codes[:, 0], before)


@pytest.mark.parametrize(
    ("assignment", "moves"), [("frozen", False), ("frozen_in_training", True), ("live", True)]
)
def test_lists_at_export_are_the_starting_ones_only_if_frozen(assignment: str, moves: bool) -> None:
    head, x = make_head(list_assignment=assignment), rand(200, D, seed=1)
    before = head.encode(x)[:, 0]
    move(head)
    assert torch.equal(head.encode(x)[:, 0], before) != moves


@pytest.mark.parametrize("assignment", ["frozen", "frozen_in_training"])
def test_frozen_codes_do_not_move_in_training_when_codewords_do(assignment: str) -> None:
    head, x = make_plain(assignment=assignment), rand(N, D, seed=1)
    before = head(x).codes
    with torch.no_grad():
        head.fine.codewords.add_(rand(M, K, S, seed=3))
    assert torch.equal(head(x).codes, before)


@pytest.mark.parametrize(
    ("assignment", "moves"), [("frozen", False), ("frozen_in_training", True), ("live", True)]
)
def test_codes_at_export_are_the_starting_ones_only_if_frozen(assignment: str, moves: bool) -> None:
    head, x = make_plain(assignment=assignment), rand(200, D, seed=1)
    before = head.encode(x)
    with torch.no_grad():
        head.fine.codewords.add_(rand(M, K, S, seed=3))
    assert torch.equal(head.encode(x), before) != moves


def test_frozen_codes_are_decoded_by_the_current_codewords_and_centroids() -> None:
    head, x = make_head(assignment="frozen", list_assignment="frozen"), rand(N, D, seed=1)
    codes = head.encode(x)
    before = head.decode(codes)
    shift = rand(1, 1, D, seed=9)
    with torch.no_grad():
        head.coarse.codewords.add_(shift)
        head.fine.codewords.add_(1.0)
    torch.testing.assert_close(head.decode(codes), before + shift[0] + 1, rtol=0, atol=1e-5)


@pytest.mark.parametrize("both", [False, True])
def test_frozen_codebooks_are_not_restarted(both: bool) -> None:
    options = {"list_assignment": "frozen"} | ({"assignment": "frozen"} if both else {})
    head, x = make_head(restart_window=1.0, **options), rand(N, D, seed=1)
    head.count(torch.zeros(100, 1 + M, dtype=torch.int64))
    restarted = head.restart_dead_codes(x, torch.Generator().manual_seed(0))
    assert list(restarted) == ([] if both else [head.fine.codewords])


def test_codes_of_a_wholly_frozen_assignment_do_not_move_with_the_centroids() -> None:
    head = make_head(assignment="frozen", list_assignment="frozen").eval()
    x = rand(N, D, seed=2)
    before = head.encode(x)
    with torch.no_grad():
        head.coarse.codewords.add_(0.5 * rand(*head.coarse.codewords.shape, seed=3))
        head.fine.codewords.add_(0.5 * rand(*head.fine.codewords.shape, seed=4))
    assert torch.equal(head.encode(x), before)
    assert torch.equal(head(x).codes, before)


def test_codes_frozen_before_live_lists_are_refused() -> None:
    with pytest.raises(InputError, match=r"list_assignment cannot be 'live'\. Set list_assignment frozen"):
        IVFProductQuantizerConfig(assignment="frozen")


# --- starting values ---


@pytest.mark.parametrize(("on_residuals", "better"), [(True, "residuals"), (False, "vectors")])
def test_codebooks_start_on_residuals_or_on_whole_vectors(on_residuals: bool, better: str) -> None:
    """Poeem's release fits them to whole vectors, though it encodes residuals."""
    x = 3 * rand(J, D, seed=0)[torch.arange(300) % J] + 0.3 * rand(300, D, seed=1)
    config = IVFProductQuantizerConfig(
        num_lists=J, num_codebooks=M, codebook_bits=3, rotation="none", residual_start=on_residuals
    )
    head = config.build(D)
    head.warm_start(x, FaissFit(kmeans_iterations=10), seed=0)
    residuals = x - head.centroids.detach()[torch.cdist(x, head.centroids.detach()).argmin(1)]
    errors = {}
    for name, vectors in {"residuals": residuals, "vectors": x}.items():
        distances = (vectors.view(300, M, 1, S) - head.fine.codewords.detach()).square().sum(-1)
        errors[name] = distances.min(-1).values.sum().item() / vectors.square().sum().item()
    assert min(errors, key=errors.get) == better


@pytest.mark.parametrize("seed", SEEDS)
def test_warm_start_is_as_good_as_faiss_itself(seed: int) -> None:
    x = rand(400, D, seed=seed) @ rand(D, D, seed=seed + 1)
    theirs = faiss.index_factory(D, f"IVF{J},PQ{M}x3")
    theirs.cp.min_points_per_centroid = theirs.pq.cp.min_points_per_centroid = 1
    theirs.train(x.numpy())
    error = np.square(theirs.sa_decode(theirs.sa_encode(x.numpy())) - x.numpy()).sum()
    head = IVFProductQuantizerConfig(num_lists=J, num_codebooks=M, codebook_bits=3, rotation="none").build(D)
    head.warm_start(x, FaissFit(), seed)
    with torch.no_grad():
        assert (head.decode(head.encode(x)) - x).square().sum().item() <= 1.1 * error


def test_warm_start_with_a_rotation_sets_it() -> None:
    head = make_head(rotation="opq")
    head.warm_start(rand(300, D, seed=0) * torch.linspace(3, 0.1, D), FaissFit(opq_iterations=2), 0)
    assert (head.rotation - orthonormal(0)).abs().max() > 0.1
    torch.testing.assert_close(head.rotation @ head.rotation.T, torch.eye(D), rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [make_head, make_plain], ids=["ivfpq", "pq"])
def test_uniform_start_keeps_the_random_codewords(make: object) -> None:
    head = make(start="uniform")
    before = head.fine.codewords.detach().clone()
    head.warm_start(rand(100, D, seed=0), FaissFit(), 0)
    assert torch.equal(head.fine.codewords, before)


def test_codewords_of_a_new_head_are_uniform_between_minus_one_and_one() -> None:
    """MoPQ's start."""
    torch.manual_seed(0)
    values = ProductQuantizerConfig(num_codebooks=4, codebook_bits=8).build(64).codebooks.detach().flatten()
    assert (values.abs() <= 1).all()
    assert np.histogram(values.numpy(), bins=10, range=(-1, 1))[0] == pytest.approx(len(values) / 10, rel=0.1)


@pytest.mark.parametrize(("documents", "lists"), [(7, 2), (19, 20)])
def test_warm_start_from_fewer_vectors_than_lists_or_codewords_is_refused(documents: int, lists: int) -> None:
    head = make_head(num_lists=lists)
    with pytest.raises(InputError, match=rf"the warm start needs at least \d+ documents .*got {documents}\."):
        head.warm_start(rand(documents, D, seed=0), FaissFit(), 0)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"num_lists": 0}, "num_lists must be at least 1, got 0"),
        ({"list_assignment": "thawed"}, "list_assignment must be one of live, frozen, .*got 'thawed'"),
        ({"assignment": "thawed"}, "assignment must be one of live, frozen, .*got 'thawed'"),
        ({"start": "zero"}, "start must be one of fit, uniform, got 'zero'"),
        ({"rotation_lr": -1.0}, "rotation_lr must be zero or more, got -1.0"),
    ],
)
def test_value_outside_its_range_is_refused_by_the_name_of_its_field(
    options: dict[str, object], fault: str
) -> None:
    with pytest.raises(InputError, match=fault):
        IVFProductQuantizerConfig(**options)
