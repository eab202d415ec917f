"""QINCo: its equations, its encoder against the plain one, its losses, and FAISS's own QINCo.

Shapes: N vectors, D dimensions, M codebooks, K codewords, J lists.
"""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from index import FaissFit
from index.qinco import qinco_index
from retriever import InputError
from retriever.heads import NeuralCodec, QINCo, QINCoConfig, greedy_search, pieces
from retriever.heads.neural import NeuralQuantizer

D, K, M = 24, 16, 3
SEEDS = (0, 1, 2)


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_qinco(seed: int, **options: Any) -> QINCo:
    """Return a head whose codebooks, networks, scale and lists are all random."""
    options = {"num_codebooks": M, "codebook_bits": 4, "hidden": 20, "network_start": "random"} | options
    torch.manual_seed(seed)
    head = QINCoConfig(**options).build(D)
    with torch.no_grad():
        head.codebooks.copy_(rand(*head.codebooks.shape, seed=seed))
        head.scale.fill_(1.7)
        if head.centroids is not None:
            head.centroids.copy_(2 * rand(*head.centroids.shape, seed=seed + 50))
    return head


def step_as_published(head: NeuralQuantizer, step: int, words: Tensor, context: Tensor) -> Tensor:
    """Evaluate f_m row by row with the whole concatenation, from the head's weights by name."""
    weights = {name: value.double() for name, value in head.state_dict().items()}
    place = step if head.centroids is not None else step - 1
    if place < 0:
        return words
    prefix = f"networks.{place}."
    joined = torch.cat([words, context], -1)
    if prefix + "concat.weight" in weights:
        z = words + joined @ weights[prefix + "concat.weight"].T + weights[prefix + "concat.bias"]
    else:
        low = joined @ weights[prefix + "concat.enter.weight"].T
        z = words + low @ weights[prefix + "concat.leave.weight"].T
    for block in range(head.config.num_blocks):  # type: ignore[attr-defined]
        up, down = (weights[f"{prefix}blocks.{block}.{side}.weight"] for side in ("up", "down"))
        z = z + F.relu(z @ up.T) @ down.T
    return z


def encode_plainly(head: NeuralQuantizer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Evaluate every codeword's whole concatenation in float64; return the codes and every distance, (N, M, K)."""
    z = x.double() / head.scale.double()
    context, codes, table = torch.zeros_like(z), [], []
    if head.centroids is not None:
        lists = torch.cdist(z, head.centroids.double()).argmin(1)
        context, codes = head.centroids.double()[lists], [lists]
    for step, words in enumerate(head.codebooks.detach().double()):
        pairs = step_as_published(
            head,
            step,
            words.repeat(len(z), 1),
            context.repeat_interleave(len(words), 0),
        ).view(len(z), len(words), -1)
        distances = (z[:, None] - context[:, None] - pairs).square().sum(-1)
        codes.append(distances.argmin(1))
        table.append(distances)
        context = context + pairs[torch.arange(len(z)), codes[-1]]
    return torch.stack(codes, 1), torch.stack(table, 1)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one block": {"num_blocks": 1},
    "four blocks": {"num_blocks": 4},
    "many hidden units": {"hidden": 64},
    "few hidden units": {"hidden": 5, "num_blocks": 3},
    "low rank": {"concat_rank": 6},
    "lists": {"num_lists": 7},
    "one codebook": {"num_codebooks": 1},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@every_variant
@pytest.mark.parametrize("seed", SEEDS)
def test_the_encoder_chooses_what_the_plain_one_does(variant: str, seed: int) -> None:
    head = make_qinco(seed, **VARIANTS[variant])
    x = 3 * rand(150, D, seed=seed + 10)
    assert torch.equal(head.encode(x), encode_plainly(head, x)[0])


@every_variant
def test_the_encoder_of_a_card_chooses_what_the_plain_one_does(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (greedy_search, pieces):
        monkeypatch.setattr(module, "on_cpu", lambda _: False)
    head = make_qinco(4, **VARIANTS[variant])
    x = 3 * rand(150, D, seed=14)
    assert torch.equal(head.encode(x), encode_plainly(head, x)[0])


@every_variant
def test_the_encoder_chooses_the_same_whatever_else_is_in_the_call(variant: str) -> None:
    head = make_qinco(0, **VARIANTS[variant])
    x = 3 * rand(200, D, seed=1)
    assert torch.equal(head.encode(x)[150:], head.encode(x[150:]))


def test_no_vectors_have_no_codes() -> None:
    assert make_qinco(0).encode(torch.empty(0, D)).shape == (0, M)


@every_variant
def test_decoding_adds_the_published_steps(variant: str) -> None:
    head = make_qinco(0, **VARIANTS[variant])
    codes = head.encode(3 * rand(50, D, seed=1))
    listed = head.centroids is not None
    context = head.centroids[codes[:, 0]].double() if listed else torch.zeros(50, D, dtype=torch.float64)
    for step, words in enumerate(head.codebooks.detach().double()):
        context = context + step_as_published(head, step, words[codes[:, step + listed]], context)
    torch.testing.assert_close(head.decode(codes).double(), 1.7 * context, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_fresh_start_has_the_codes_of_faisss_residual_quantizer(seed: int) -> None:
    x = rand(400, D, seed=seed)
    head = QINCoConfig(num_codebooks=M, codebook_bits=4, hidden=20).build(D)
    head.warm_start(x, FaissFit(), seed)
    rq = faiss.ResidualQuantizer(D, M, 4)
    rq.max_beam_size = 1
    faiss.copy_array_to_vector(head.codebooks.detach().numpy().ravel(), rq.codebooks)
    rq.is_trained = True
    assert np.array_equal(head.pack(head.encode(x)), rq.compute_codes(head.standardize(x).numpy()))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_fresh_start_has_the_error_of_the_residual_quantizer(seed: int) -> None:
    x = rand(400, D, seed=seed)
    head = QINCoConfig(num_codebooks=M, codebook_bits=4, hidden=20).build(D)
    head.warm_start(x, FaissFit(), seed)
    residual = x.double() / head.scale.double()
    for words in head.codebooks.detach().double():
        residual = residual - words[torch.cdist(residual, words).argmin(1)]
    expected = head.scale.double() ** 2 * residual.square().sum(1).mean()
    error = (x - head.decode(head.encode(x))).double().square().sum(1).mean()
    assert error.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_scale_of_the_start_is_the_largest_component() -> None:
    x = rand(300, D, seed=0)
    x[17, 5] = -9.0
    head = QINCoConfig(num_codebooks=M, codebook_bits=4).build(D)
    head.warm_start(x, FaissFit(), 0)
    assert (head.scale.item(), head.offset.abs().max().item()) == (9.0, 0.0)


def losses_in_one_pass(head: QINCo, x: Tensor) -> Tensor:
    """Evaluate all codewords with a graph, and take the best of each step as it comes."""
    z = head.standardize(x)
    context, total = torch.zeros_like(z), torch.zeros(())
    for step, words in enumerate(head.codebooks):
        network = head.network(step)
        rows = words.repeat(len(z), 1)
        pairs = rows if network is None else network(rows, context.repeat_interleave(len(words), 0))
        pairs = pairs.view(len(z), len(words), -1)
        best = (z[:, None] - context[:, None] - pairs).square().sum(-1).argmin(1)
        context = context + pairs[torch.arange(len(z)), best]
        total = total + (context - z).square().sum() / z.numel()
    return total


@pytest.mark.parametrize("seed", SEEDS)
def test_loss_and_gradients_of_two_passes_are_those_of_one(seed: int) -> None:
    head = make_qinco(seed)
    x = 3 * rand(60, D, seed=seed + 10)
    expected = losses_in_one_pass(head, x)
    gradients = torch.autograd.grad(expected, list(head.parameters()))
    loss = head(x).losses["distortion"]
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for found, wanted in zip(torch.autograd.grad(loss, list(head.parameters())), gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("lists", [0, 5])
def test_the_number_of_parameters_is_the_papers(lists: int) -> None:
    head = QINCoConfig(num_codebooks=8, num_blocks=2, hidden=256, num_lists=lists).build(128)
    steps = 8 if lists else 7
    expected = 8 * 256 * 128 + steps * (2 * 128**2 + 128 + 2 * 2 * 128 * 256)
    assert sum(parameter.numel() for parameter in head.parameters()) == expected


@pytest.mark.parametrize(("blocks", "bytes_", "millions"), [(8, 8, 4.2), (8, 16, 8.9)])
def test_the_number_of_parameters_is_that_of_the_papers_table(
    blocks: int, bytes_: int, millions: float
) -> None:
    """The paper's table for BigANN, 128 dimensions."""
    head = QINCoConfig(num_codebooks=bytes_, num_blocks=blocks, hidden=256).build(128)
    assert sum(parameter.numel() for parameter in head.parameters()) / 1e6 == pytest.approx(
        millions, abs=0.06
    )


@pytest.mark.parametrize("lists", [0, 5])
@pytest.mark.parametrize("kept", [1, 2])
def test_the_first_codes_are_the_codes_of_the_truncated_head(lists: int, kept: int) -> None:
    head = make_qinco(0, num_lists=lists)
    x = 3 * rand(80, D, seed=1)
    short = head.truncated(kept)
    assert torch.equal(short.encode(x), head.encode(x)[:, : kept + bool(lists)])


def test_a_truncated_head_decodes_to_the_reconstruction_after_its_last_step() -> None:
    head = make_qinco(0)
    codes = head.encode(3 * rand(80, D, seed=1))
    expected = head.restore(head.reconstructions(codes)[1])
    torch.testing.assert_close(head.truncated(2).decode(codes[:, :2]), expected, rtol=0, atol=0)


def test_a_longer_head_cannot_be_cut_from_a_shorter_one() -> None:
    with pytest.raises(InputError, match=r"between 1 and 3, those of the head, got 4"):
        make_qinco(0).truncated(4)


def test_the_list_of_a_vector_is_its_nearest_centroid_for_ever() -> None:
    head = make_qinco(0, num_lists=7)
    x = 3 * rand(60, D, seed=1)
    expected = torch.cdist(head.standardize(x), head.centroids).argmin(1)
    assert torch.equal(head.encode(x)[:, 0], expected)
    assert not any(parameter.data_ptr() == head.centroids.data_ptr() for parameter in head.parameters())


@pytest.mark.parametrize("lists", [0, 5])
def test_the_retrieval_loss_reaches_the_vectors_alone(lists: int) -> None:
    head = make_qinco(0, num_lists=lists)
    x = rand(30, D, seed=1).requires_grad_()
    weight = rand(30, D, seed=2)
    gradients = torch.autograd.grad(
        (head(x).reconstruction * weight).sum(), [x, *head.parameters()], allow_unused=True
    )
    torch.testing.assert_close(gradients[0], weight, rtol=0, atol=1e-6)
    assert gradients[1:] == (None,) * (len(gradients) - 1)


def test_with_task_gradient_the_retrieval_loss_reaches_codebooks_and_every_network_too() -> None:
    head = make_qinco(0, task_gradient=True)
    x = rand(200, D, seed=1).requires_grad_()
    weight = rand(200, D, seed=2)
    gradients = torch.autograd.grad((head(x).reconstruction * weight).sum(), [x, *head.parameters()])
    torch.testing.assert_close(gradients[0], weight, rtol=0, atol=1e-6)
    assert all(bool(gradient.abs().sum() > 0) for gradient in gradients[1:])


def test_the_distortion_moves_no_tower() -> None:
    head = make_qinco(0)
    x = rand(30, D, seed=1).requires_grad_()
    assert torch.autograd.grad(head(x).losses["distortion"], [x], allow_unused=True) == (None,)


def test_detached_steps_get_no_gradient_of_later_ones() -> None:
    x = 3 * rand(60, D, seed=1)
    head = make_qinco(0, detach_steps=True)
    z = head.standardize(x)
    first = (head.codebooks[0][head.encode(x)[:, 0]] - z).square().mean()
    expected = torch.autograd.grad(first, [head.codebooks])[0][0]
    found = torch.autograd.grad(head(x).losses["distortion"], [head.codebooks])[0][0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_unused_codewords_become_residuals_of_their_step() -> None:
    head = make_qinco(0, restart_window=1.0)
    x = 3 * rand(100, D, seed=1)
    codes = head.encode(x)
    head.count(codes)
    dead = head.books.usage == 0
    assert dead.any()
    steps = head.reconstructions(codes)
    residual = head.standardize(x) - steps[0].detach()
    masks = head.restart_dead_codes(x, torch.Generator().manual_seed(0))
    assert torch.equal(masks[head.codebooks], dead)
    distance = torch.cdist(head.codebooks[1][dead[1]].detach().double(), residual.double()).amin(1)
    assert distance.max().item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("lists", [0, 5])
def test_the_export_says_what_an_index_needs(lists: int) -> None:
    head = make_qinco(0, num_lists=lists)
    export = head.export()
    assert isinstance(export, NeuralCodec)
    assert (export.dim, export.num_codes, export.code_bits, export.metric) == (D, M, 4, "l2")
    if lists:
        torch.testing.assert_close(export.centroids, 1.7 * head.centroids)
    else:
        assert export.centroids is None


# --- faiss.IndexQINCo ---


@pytest.mark.parametrize("variant", ["plain", "one block", "four blocks", "low rank"])
@pytest.mark.parametrize("metric", ["l2", "inner_product"])
def test_faiss_encodes_decodes_and_scores_as_the_head_does(variant: str, metric: str) -> None:
    head = make_qinco(1, metric=metric, **VARIANTS[variant])
    x, queries = 3 * rand(60, D, seed=2), rand(5, D, seed=3)
    codes = head.pack(head.encode(x))
    built = qinco_index(head, codes)
    assert np.array_equal(built.sa_encode(x.numpy()), codes)
    decoded = head.decode(head.encode(x)).detach()
    np.testing.assert_allclose(built.sa_decode(codes), decoded.numpy(), rtol=1e-5, atol=1e-5)
    found, rows = built.search(queries.numpy(), 60)
    exact = queries.double() @ decoded.double().T
    if metric == "l2":
        exact = torch.cdist(queries.double(), decoded.double()).square()
    expected = exact.gather(1, torch.from_numpy(rows))
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-5, atol=2e-5)


def test_faiss_has_no_lists_for_qinco() -> None:
    with pytest.raises(InputError, match=r"no inverted lists, and the head has 5\. Train with num_lists 0"):
        qinco_index(make_qinco(0, num_lists=5))


# --- configuration ---


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"num_blocks": 0}, r"num_blocks must be at least 1, got 0"),
        ({"hidden": 0}, r"hidden must be at least 1, got 0"),
        ({"concat_rank": 0}, r"concat_rank must be at least 1, got 0"),
        ({"network_start": "ones"}, r"network_start must be one of zero, random, got 'ones'"),
        ({"num_lists": -1}, r"num_lists must be 0, for no lists, or more, got -1"),
        ({"distortion_weight": 0.0}, r"leaves nothing that trains .* task_gradient true"),
    ],
)
def test_a_value_outside_its_range_is_refused(options: dict[str, Any], fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        QINCoConfig(**options)


def test_a_sample_smaller_than_the_lists_is_refused() -> None:
    with pytest.raises(InputError, match=r"at least 40 documents for num_lists=40, got 20"):
        QINCoConfig(codebook_bits=4, num_lists=40).check_sample(20)
