"""The compression network and the head around it.

Shapes: B vectors, D dimensions, T tokens, t dimensions of a token and of the output.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retriever import InputError
from retriever.heads import (
    CNT,
    CNTConfig,
    FlatVectors,
    NoCompressionConfig,
    ProductCodebooks,
    ProductQuantizerConfig,
)
from retriever.transforms.batch_norm import Affine, BatchNorm, calibrate
from retriever.transforms.cnt import CompressionNetwork, sparse_projection

D, T, WIDTH = 24, 6, 16


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_network(seed: int = 0, *, trained: bool = True) -> CompressionNetwork:
    """Return a network; `trained` ones have random norms, so that no branch is 0."""
    torch.manual_seed(seed)
    network = CompressionNetwork(D, expansion=4, tokens=T)
    network.start_sparse(torch.Generator().manual_seed(seed))
    if trained:
        for module in network.modules():
            if isinstance(module, BatchNorm):
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_()
        network.train()
        for step in range(5):
            network(3 * rand(200, D, seed=step) + 1)
    return network


class SpyFit:
    """A `QuantizerFit` that keeps the sample it was given."""

    def product_codebooks(
        self, sample: Tensor, *, num_codebooks: int, codebook_bits: int, rotate: bool, seed: int
    ) -> tuple[None, Tensor]:
        self.sample = sample
        words = sample[: 2**codebook_bits].view(2**codebook_bits, num_codebooks, -1)
        return None, words.transpose(0, 1)


def make_head(seed: int = 0, **options: Any) -> CNT:
    torch.manual_seed(seed)
    head = CNTConfig(tokens=T, **options).build(D)
    head.warm_start(5 * rand(300, D, seed=seed) + 2, SpyFit(), seed)
    return head


# --- the network as published ---


@pytest.mark.parametrize(
    ("dim", "expansion", "tokens", "out_dim", "millions"),
    [
        (960, 4, 8, 480, "10.40"),
        (960, 3, 12, 240, "4.69"),
        (256, 4, 8, 128, "0.746"),
        (256, 3, 12, 64, "0.338"),
        (768, 4, 8, 384, "6.66"),
        (768, 3, 12, 192, "3.0"),
    ],
)
def test_number_of_parameters_is_the_published_one(
    dim: int, expansion: int, tokens: int, out_dim: int, millions: str
) -> None:
    with torch.device("meta"):
        network = CompressionNetwork(dim, expansion=expansion, tokens=tokens)
    digits = len(millions.partition(".")[2])
    count = sum(parameter.numel() for parameter in network.parameters())
    assert (network.width, f"{count / 1e6:.{digits}f}") == (out_dim, millions)


@pytest.mark.parametrize("training", [True, False])
def test_attention_adds_exactly_nothing_at_the_start(training: bool) -> None:
    network = make_network(trained=False).train(training)
    for stage in network.stages:
        assert torch.equal(stage.attention(rand(9, T + 1, WIDTH, seed=1)), torch.zeros(9, T + 1, WIDTH))


def test_sparse_projection_has_one_entry_in_root_dim_and_their_published_size() -> None:
    dim, width = 400, 50
    projection = sparse_projection(2000, dim, width, torch.Generator().manual_seed(0))
    size = (dim**0.5 / width) ** 0.5
    values = projection.unique()
    torch.testing.assert_close(values, torch.tensor([-size, 0.0, size]))
    density = (projection != 0).double().mean().item()
    assert density == pytest.approx(1 / dim**0.5, rel=0.02)
    assert (projection > 0).double().mean().item() == pytest.approx(density / 2, rel=0.03)


def test_the_expansion_starts_as_a_sparse_projection_that_trains() -> None:
    weight = make_network(trained=False).embed.linear.weight
    assert weight.requires_grad
    assert weight.unique().numel() == 3


def reference(network: CompressionNetwork, x: Tensor) -> Tensor:
    """The network in inference, written from its description in float64, one vector and one head at a time."""
    state = {name: value.double() for name, value in network.state_dict().items()}

    def norm(name: str, v: Tensor) -> Tensor:
        centred = v - state[f"{name}.running_mean"]
        scaled = centred / (state[f"{name}.running_var"] + 1e-5).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(name: str, v: Tensor) -> Tensor:
        return v @ state[f"{name}.weight"].T + state.get(f"{name}.bias", torch.zeros(()))

    def hardswish(v: Tensor) -> Tensor:
        return v * (v + 3).clamp(0, 6) / 6

    def stage(name: str, z: Tensor) -> Tensor:
        mixed = norm(f"{name}.attention.qkv.norm", linear(f"{name}.attention.qkv.linear", z))
        heads = []
        for head, part in enumerate(mixed.split(WIDTH // 4 * 2 + WIDTH, dim=1)):
            q, k, v = part[:, : WIDTH // 4], part[:, WIDTH // 4 : WIDTH // 2], part[:, WIDTH // 2 :]
            logits = q @ k.T / (WIDTH / 4) ** 0.5 + state[f"{name}.attention.position_bias"][head]
            heads.append(logits.softmax(1) @ v)
        joined = torch.cat(heads, 1).clamp(-1, 1)
        z = z + norm(f"{name}.attention.project.norm", linear(f"{name}.attention.project.linear", joined))
        hidden = norm(f"{name}.mlp.first.norm", linear(f"{name}.mlp.first.linear", z))
        return z + norm(f"{name}.mlp.norm", hardswish(linear(f"{name}.mlp.second", hidden)))

    outputs = []
    for row in x.double():
        tokens = norm("embed.norm", linear("embed.linear", row)).view(T, WIDTH)
        last = norm("compress_norm", hardswish(linear("compress", row)))
        skip = linear("skip", row)
        z = torch.cat([tokens, last[None]])
        for number in range(2):
            z = stage(f"stages.{number}", z)
            z[-1] += skip
        outputs.append(linear("out", z[-1] + skip))
    return torch.stack(outputs)


def test_output_is_that_of_the_published_description() -> None:
    network, x = make_network(3).eval(), rand(7, D, seed=11)
    torch.testing.assert_close(network(x).double(), reference(network, x), rtol=0, atol=1e-4)


# --- batch normalization ---


@pytest.mark.parametrize("shape", [(50, WIDTH), (10, 7, WIDTH)])
def test_batch_normalization_is_torchs_over_all_rows(shape: tuple[int, ...]) -> None:
    ours, torchs = BatchNorm(WIDTH), nn.BatchNorm1d(WIDTH)
    for step in range(3):
        x = 2 * rand(*shape, seed=step) + 1
        torch.testing.assert_close(ours(x).flatten(0, -2), torchs(x.flatten(0, -2)))
    torch.testing.assert_close(ours.running_mean, torchs.running_mean)
    torch.testing.assert_close(ours.running_var, torchs.running_var)
    x = rand(*shape, seed=9)
    torch.testing.assert_close(ours.eval()(x).flatten(0, -2), torchs.eval()(x.flatten(0, -2)))


def test_folded_network_gives_the_output_of_the_network_in_inference() -> None:
    network = make_network().eval()
    x = rand(50, D, seed=1)
    torch.testing.assert_close(network.folded()(x), network(x), rtol=0, atol=1e-5)


def test_folded_network_has_no_batch_normalization_and_only_the_norms_behind_activations_as_factors() -> None:
    modules = list(make_network().folded().modules())
    assert not [module for module in modules if isinstance(module, BatchNorm)]
    assert sum(isinstance(module, Affine) for module in modules) == 3  # compression token, two perceptrons


def test_calibration_makes_inference_on_the_sample_what_training_gives() -> None:
    network, sample = make_network(), 2 * rand(400, D, seed=7) - 1
    calibrate(network, sample)
    expected = network.train()(sample)
    torch.testing.assert_close(network.eval()(sample), expected, rtol=0, atol=2e-2)  # n - 1 against n


# --- the start as PCA ---


def test_network_starts_as_principal_components() -> None:
    x = rand(500, D, seed=0) @ rand(D, D, seed=1)
    network = make_network(trained=False)
    network.start_principal(x)
    calibrate(network, x)
    centred = (x - x.mean(0)).double().numpy()
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    found = network.eval()(x).double()
    expected = torch.from_numpy(centred @ directions[:WIDTH].T)
    torch.testing.assert_close(
        (found - found.mean(0)).abs(), expected.abs(), rtol=0, atol=1e-3
    )  # the sign of a direction is free


def test_gradient_reaches_every_branch_after_a_step_from_the_start_as_pca() -> None:
    network, x = make_network(trained=False), rand(64, D, seed=0)
    network.start_principal(x)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        network.train()(x).square().sum().backward()
        optimizer.step()
    still = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []


# --- the head ---


def test_a_start_as_pca_of_all_dimensions_keeps_distances_in_the_units_of_the_vectors() -> None:
    head = CNTConfig(expansion=4, tokens=4).build(D)
    x = 5 * rand(300, D, seed=0) + 2
    head.warm_start(x, SpyFit(), 0)
    torch.testing.assert_close(F.pdist(head.map_queries(x[:40])), F.pdist(x[:40]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_codes_and_queries_do_not_depend_on_the_batch_they_come_in(training: bool) -> None:
    head = make_head(inner=ProductQuantizerConfig(num_codebooks=4, codebook_bits=4, rotation="none"))
    head.train(training)
    x = rand(30, D, seed=1)
    assert torch.equal(torch.cat([head.encode(row[None]) for row in x]), head.encode(x))
    one_by_one = torch.cat([head.map_queries(row[None]) for row in x])
    torch.testing.assert_close(one_by_one, head.map_queries(x), rtol=0, atol=1e-4)


def test_training_normalizes_documents_and_queries_together() -> None:
    head, x, q = make_head(start="sparse").train(), rand(9, D, seed=1), 3 + rand(5, D, seed=2)
    output, queries = head.compress_batch(x, q)
    again = head(torch.cat([x, q])).mapped
    torch.testing.assert_close(torch.cat([output.mapped, queries]), again, rtol=0, atol=1e-5)
    assert not torch.allclose(queries, head(q).mapped, atol=1e-2)


def test_what_was_folded_for_inference_is_forgotten_when_the_network_trains_or_is_loaded() -> None:
    head, x = make_head().eval(), rand(5, D, seed=1)
    before = head.map_queries(x)
    state = {name: value.clone() for name, value in head.state_dict().items()}
    head.train()
    with torch.no_grad():
        head.network.out.weight.mul_(2)
    torch.testing.assert_close(head.eval().map_queries(x), 2 * before, rtol=0, atol=1e-4)
    head.load_state_dict(state)
    torch.testing.assert_close(head.map_queries(x), before)


def test_inner_head_starts_from_the_networks_output() -> None:
    torch.manual_seed(0)
    inner = ProductQuantizerConfig(num_codebooks=4, codebook_bits=4, rotation="none")
    head, fit, sample = CNTConfig(tokens=T, inner=inner).build(D), SpyFit(), rand(300, D, seed=3)
    head.warm_start(sample, fit, 0)
    torch.testing.assert_close(fit.sample, head.map_queries(sample))


def test_float_vectors_of_the_network_are_exported_for_l2() -> None:
    assert make_head().export() == FlatVectors(dim=WIDTH, metric="l2")


def test_export_with_an_inner_head_is_the_inner_heads() -> None:
    head = make_head(inner=ProductQuantizerConfig(num_codebooks=4, codebook_bits=4, rotation="none"))
    export = head.export()
    assert isinstance(export, ProductCodebooks)
    assert (export.codebooks.shape, export.metric) == ((4, 16, WIDTH // 4), "l2")


def test_gradient_of_the_reconstruction_reaches_network_and_codewords() -> None:
    inner = ProductQuantizerConfig(num_codebooks=4, codebook_bits=4, rotation="none")
    head = make_head(start="sparse", inner=inner).train()
    head(rand(30, D, seed=1)).reconstruction.square().sum().backward()
    assert head.network.compress.weight.grad.abs().sum() > 0
    assert head.inner.codebooks.grad.abs().sum() > 0


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "width": ({"tokens": 7}, r"multiple of 4 x tokens, got dim=24, expansion=4 and tokens=7\. Try tokens=6"),
    "larger": ({"expansion": 4, "tokens": 3}, r"expansion must not be larger than tokens.*got 4 and 3"),
    "no tokens": ({"tokens": 0}, r"tokens must be at least 1, got 0"),
    "start": ({"start": "warm"}, r"start must be one of sparse, pca, got 'warm'"),
    "nested": ({"inner": CNTConfig()}, r"inner must be a head that quantizes, got 'cnt'"),
    "nothing": ({"inner": NoCompressionConfig()}, r"got 'none'\. Leave inner out"),
    "metric": (
        {"tokens": 6, "inner": ProductQuantizerConfig(num_codebooks=4, metric="inner_product")},
        r"metric l2, got 'inner_product'\. Set inner\.metric l2",
    ),
    "inner dimension": (
        {"tokens": 6, "inner": ProductQuantizerConfig(num_codebooks=5)},
        r"multiple of num_codebooks, got dim=16 and num_codebooks=5",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_head_that_cannot_work_is_refused_with_a_remedy(name: str) -> None:
    options, fault = FAULTS[name]
    with pytest.raises(InputError, match=fault):
        CNTConfig(**options).build(D)


def test_a_sample_too_small_for_the_inner_head_is_refused() -> None:
    with pytest.raises(InputError, match=r"needs at least 256 documents"):
        CNTConfig(inner=ProductQuantizerConfig()).check_sample(255)
