"""UNQ: logits, Gumbel-softmax, losses and start by their formulas, in float64.

Shapes: n vectors, D dimensions, M codebooks, K codewords, C dimensions of a learned space.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from index import FaissFit
from retriever import InputError
from retriever.heads import UNQ, NeuralCodec, UNQConfig
from retriever.heads.unq import squared_variation, triplet_loss
from retriever.transforms.batch_norm import BatchNorm

D, M, BITS, K, C = 12, 3, 4, 16, 8
SIZE: dict[str, Any] = {
    "num_codebooks": M,
    "codebook_bits": BITS,
    "code_dim": C,
    "hidden": 24,
    "num_layers": 2,
    "start_steps": 0,
    "start_batch": 64,
}


def make_vectors(seed: int, rows: int = 400) -> Tensor:
    """Return vectors on a curved surface of 3 dimensions, off the origin."""
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(99)
    first, second = torch.randn(3, 32, generator=fixed), torch.randn(32, D, generator=fixed)
    return torch.tanh(torch.randn(rows, 3, generator=generator) @ first) @ second + 5


def make_unq(seed: int = 0, **options: Any) -> UNQ:
    """Return a head in inference mode, started on vectors."""
    torch.manual_seed(seed)
    head = UNQConfig(**(SIZE | options)).build(D).eval()
    head.warm_start(make_vectors(0), FaissFit(), seed)
    return head


def run_exactly(network: nn.Module, z: Tensor) -> Tensor:
    """Return a network's output in float64, batch normalization by running statistics."""
    for layer in network.children() if isinstance(network, nn.Sequential) else [network]:
        if isinstance(layer, nn.Sequential):
            z = run_exactly(layer, z)
        elif isinstance(layer, nn.Linear):
            z = z @ layer.weight.double().T + (0 if layer.bias is None else layer.bias.double())
        elif isinstance(layer, BatchNorm):
            scale = layer.weight.double() / (layer.running_var.double() + 1e-5).sqrt()
            z = (z - layer.running_mean.double()) * scale + layer.bias.double()
        else:
            z = z.clamp(min=0)
    return z


def exact_logits(head: UNQ, x: Tensor) -> Tensor:
    """Return <e_m(x), c> / tau_m in float64, (n, M, K)."""
    z = (x.double() - head.offset.double()) / head.scale.double()
    encoded = run_exactly(head.encoder, z).view(len(x), M, 1, C)
    products = (encoded * head.books.codewords.double()).sum(-1)
    return (products / head.log_temperature.double().exp()[:, None]).detach()


def squared_error(head: UNQ, x: Tensor) -> float:
    return (head.decode(head.encode(x)) - x).square().sum(1).mean().item()


# --- codes and vectors ---


def test_a_code_is_the_codeword_of_the_largest_inner_product_with_the_encoded_vector() -> None:
    head, x = make_unq(), make_vectors(1)
    assert torch.equal(head.encode(x), exact_logits(head, x).argmax(-1))


def test_a_code_decodes_to_what_the_network_makes_of_the_sum_of_its_codewords() -> None:
    head = make_unq()
    codes = head.encode(make_vectors(1))
    sums = sum(head.books.codewords[m, codes[:, m]].double() for m in range(M))
    expected = run_exactly(head.decoder, sums) * head.scale.double() + head.offset.double()
    torch.testing.assert_close(head.decode(codes).double(), expected, rtol=1e-5, atol=1e-5)


def test_codes_and_vectors_are_the_same_in_training_as_in_inference() -> None:
    head, x = make_unq(), make_vectors(1)
    codes, decoded = head.encode(x), head.decode(head.encode(x))
    head.train()
    assert torch.equal(head.encode(x[:3]), codes[:3])
    assert torch.equal(head.decode(codes), decoded)
    assert all(module.training for module in head.modules())


def test_export_leaves_the_networks_to_the_head() -> None:
    export = make_unq(metric="inner_product").export()
    assert export == NeuralCodec(dim=D, num_codes=M, code_bits=BITS, metric="inner_product")


# --- Gumbel-softmax ---


def test_codewords_are_drawn_in_training_with_the_probabilities_of_the_softmax() -> None:
    head = make_unq()
    x = make_vectors(1, rows=1)
    expected = exact_logits(head, x).softmax(-1)[0]
    head.train()
    head.encoder.eval()  # the statistics by which `expected` was computed
    z = ((x - head.offset) / head.scale).expand(6000, D)
    _, chosen = head._choose(z, torch.Generator().manual_seed(0))
    nearest = torch.cdist(chosen.transpose(0, 1), head.books.codewords).argmin(-1)  # (M, n)
    found = torch.stack([torch.bincount(row, minlength=K) / 6000 for row in nearest])
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.03)


def test_a_vector_is_reconstructed_in_training_from_whole_codewords() -> None:
    head = make_unq().train()
    _, chosen = head._choose(torch.randn(50, D), torch.Generator().manual_seed(0))
    distances = torch.cdist(chosen.transpose(0, 1), head.books.codewords).min(-1).values
    assert distances.max() < 1e-2  # cdist's own rounding


def test_noise_is_equal_for_equal_seeds_and_absent_in_inference() -> None:
    head, x = make_unq(), make_vectors(1)
    assert torch.equal(head(x).reconstruction, head(x).reconstruction)
    head.train()
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(head(x).reconstruction)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# --- gradients ---


@pytest.mark.parametrize("task_gradient", [False, True])
def test_the_retrieval_loss_reaches_the_vectors_and_the_networks_if_asked(task_gradient: bool) -> None:
    head = make_unq(task_gradient=task_gradient).train()
    x, upstream = make_vectors(1).requires_grad_(), torch.randn(400, D)
    head(x).reconstruction.backward(upstream)
    torch.testing.assert_close(x.grad, upstream)
    reached = [parameter.grad is not None and bool(parameter.grad.any()) for parameter in head.parameters()]
    assert all(reached) if task_gradient else not any(reached)


def test_distortion_is_the_squared_error_of_standardized_vectors_and_moves_every_parameter() -> None:
    head, x = make_unq(distortion_weight=0.5), make_vectors(1).requires_grad_()
    loss = head(x).losses["distortion"]
    error = ((x - head(x).reconstruction) / head.scale).square().sum(1).mean()
    assert loss.item() == pytest.approx(0.5 * error.item(), rel=1e-4)
    loss.backward()
    assert x.grad is None
    assert all(bool(parameter.grad.any()) for parameter in head.parameters())


def test_commitment_moves_the_vectors_alone() -> None:
    head, x = make_unq(commitment_weight=0.5), make_vectors(1).requires_grad_()
    head(x).losses["commitment"].backward()
    expected = 0.5 * 2 * (x - head.decode(head.encode(x))) / len(x)
    torch.testing.assert_close(x.grad, expected.detach(), rtol=1e-3, atol=1e-5)
    assert all(parameter.grad is None for parameter in head.parameters())


# --- losses ---


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_variation_is_that_of_the_mean_probabilities(seed: int) -> None:
    logits = torch.randn(50, M, K, generator=torch.Generator().manual_seed(seed))
    share = (logits.double().exp() / logits.double().exp().sum(-1, keepdim=True)).mean(0)
    expected = [(row.std(correction=0) / row.mean()).item() ** 2 for row in share]
    assert squared_variation(logits).item() == pytest.approx(sum(expected) / M, rel=1e-4)


def test_variation_is_nothing_for_even_use_and_largest_for_one_codeword() -> None:
    one = torch.zeros(5, M, K)
    one[:, :, 3] = 1e4
    assert squared_variation(torch.zeros(5, M, K)).item() == pytest.approx(0, abs=1e-6)
    assert squared_variation(one).item() == pytest.approx(K - 1)


def test_the_weight_of_the_balance_falls_to_its_floor() -> None:
    head = make_unq(balance_weight=0.8, balance_floor=0.1, balance_steps=4).train()
    found = []
    for _ in range(6):
        found.append(head.balance_weight)
        head(make_vectors(1))
    assert found == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.1, 0.1])


def test_triplet_loss_is_the_margin_between_the_nearest_and_a_farther_vectors_codes() -> None:
    generator = torch.Generator().manual_seed(0)
    z, logits = torch.randn(20, D, generator=generator), torch.randn(20, M, K, generator=generator)
    codes, expected = logits.argmax(-1), []
    for row in range(20):
        others = sorted((j for j in range(20) if j != row), key=lambda j: (z[j] - z[row]).norm().item())
        near, far = (
            -sum(logits[row, m, codes[j, m]].item() for m in range(M)) for j in (others[0], others[7])
        )
        expected.append(max(0.0, 0.1 + near - far))
    found = triplet_loss(z, logits, torch.full((20,), 7), 0.1)
    assert found.item() == pytest.approx(sum(expected) / 20, rel=1e-5)


def test_a_triplet_of_a_small_batch_takes_its_farthest_vector() -> None:
    z, logits = torch.randn(4, D), torch.randn(4, M, K)
    ranks = torch.full((4,), 150)
    assert torch.equal(triplet_loss(z, logits, ranks, 0.1), triplet_loss(z, logits, ranks * 0 + 2, 0.1))


def test_triplet_loss_is_part_of_the_losses_only_with_a_weight() -> None:
    x = make_vectors(1)
    assert set(make_unq()(x).losses) == {"distortion", "balance"}
    assert set(make_unq(triplet_weight=0.01)(x).losses) == {"distortion", "balance", "triplet"}


# --- start ---


def test_vectors_are_standardized_by_the_sample() -> None:
    head, x = make_unq(), make_vectors(0).double()
    torch.testing.assert_close(head.offset.double(), x.mean(0), rtol=1e-5, atol=1e-5)
    assert head.scale.item() == pytest.approx((x - x.mean(0)).square().mean().sqrt().item(), rel=1e-5)


def test_codewords_start_as_encoded_vectors() -> None:
    head = make_unq()
    z = (make_vectors(0).double() - head.offset.double()) / head.scale.double()
    encoded = run_exactly(head.encoder, z).view(-1, M, C).transpose(0, 1)
    distances = torch.cdist(head.books.codewords.double(), encoded).min(-1).values
    assert distances.max() < 1e-3


@pytest.mark.parametrize("entropy", [1.0, 3.0])
def test_temperatures_start_with_the_entropy_asked_for(entropy: float) -> None:
    head = make_unq(start_entropy=entropy)
    log_p = exact_logits(head, make_vectors(0)).log_softmax(-1)
    found = -(log_p.exp() * log_p).sum(-1).mean(0)
    torch.testing.assert_close(found, torch.full((M,), entropy * BITS / 8).double(), rtol=0, atol=1e-3)


def test_steps_of_the_start_lower_the_error_of_new_vectors() -> None:
    x = make_vectors(2)
    assert squared_error(make_unq(start_steps=150, start_lr=3e-3), x) < 0.4 * squared_error(make_unq(), x)


def test_starts_with_one_seed_are_equal() -> None:
    first, second = (make_unq(start_steps=3, triplet_weight=0.1).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_start_leaves_mode_gradients_and_random_numbers_as_they_are() -> None:
    head = UNQConfig(**(SIZE | {"start_steps": 2})).build(D).eval()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    head.warm_start(make_vectors(0), FaissFit(), 0)
    assert torch.equal(torch.rand(3), expected)
    assert not any(module.training for module in head.modules())
    assert all(parameter.grad is None for parameter in head.parameters())


def test_an_unused_codeword_becomes_an_encoded_vector() -> None:
    head, x = make_unq(restart_window=1.0), make_vectors(1, rows=100)
    codes = head.encode(x)
    codes[:, 1][codes[:, 1] == 7] = 6
    head.count(codes)
    mask = head.restart_dead_codes(x, torch.Generator().manual_seed(0))[head.books.codewords]
    z = (x.double() - head.offset.double()) / head.scale.double()
    encoded = run_exactly(head.encoder, z).view(-1, M, C)[:, 1]
    assert bool(mask[1, 7])
    assert (encoded - head.books.codewords[1, 7].double()).abs().sum(1).min() < 1e-3


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"hidden": 0}, r"hidden must be at least 1, got 0"),
        ({"start_batch": 1}, r"start_batch must be at least 2, to normalize over, got 1"),
        ({"start_entropy": 6.0}, r"start_entropy must be above 0 and below 5\.5"),
        ({"start_lr": 0.0}, r"start_lr must be positive, got 0\.0"),
        ({"distortion_weight": 0.0}, r"leaves nothing that trains the decoder"),
    ],
)
def test_a_value_that_cannot_work_is_refused(options: dict[str, Any], fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        UNQConfig(**options)


def test_a_sample_that_is_too_small_is_refused() -> None:
    with pytest.raises(InputError, match="at least 16 documents for 4-bit"):
        UNQConfig(**SIZE).build(D).warm_start(make_vectors(0, rows=15), FaissFit(), 0)
