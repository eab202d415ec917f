"""QINCo2: candidates, beam, projections, starting values, the loss of the short lists, restarts.

Shapes: N vectors, D dimensions, M codebooks, K codewords, A candidates, B hypotheses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from index import FaissFit
from retriever import InputError
from retriever.heads import QINCo2, QINCo2Config
from retriever.heads.residual import beam_search

D, K, M = 24, 16, 4
SEEDS = (0, 1, 2)
SIZES: dict[str, Any] = {"num_codebooks": M, "codebook_bits": 4, "width": 10, "hidden": 20}


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_qinco2(seed: int, **options: Any) -> QINCo2:
    """Return a head whose weights are all random but small enough for its short lists to be of use."""
    torch.manual_seed(seed)
    head = QINCo2Config(**SIZES | options).build(D)
    with torch.no_grad():
        for parameter in head.networks.parameters():
            parameter.copy_(0.15 * torch.randn_like(parameter))
        decay = 0.8 ** torch.arange(M)[: len(head.codebooks), None, None]
        head.codebooks.copy_(decay * rand(*head.codebooks.shape, seed=seed))
        head.shortlists.copy_(head.codebooks[-len(head.shortlists) :])
        head.scale.fill_(1.7)
        head.offset.copy_(rand(D, seed=seed + 40))
        if head.centroids is not None:
            head.centroids.copy_(rand(*head.centroids.shape, seed=seed + 50))
    return head


def step_as_published(head: QINCo2, step: int, words: Tensor, context: Tensor) -> Tensor:
    """Evaluate f_m row by row with the whole concatenation, from the head's weights by name."""
    weights = {name: value.double() for name, value in head.state_dict().items()}
    place = step if head.centroids is not None else step - 1
    if place < 0:
        return words
    prefix = f"networks.{place}."
    projected = prefix + "project_in.weight" in weights
    u = words @ weights[prefix + "project_in.weight"].T if projected else words
    u = (
        u
        + torch.cat([u, context], -1) @ weights[prefix + "concat.weight"].T
        + weights[prefix + "concat.bias"]
    )
    for block in range(head.config.size("num_blocks")):
        up, down = (weights[f"{prefix}blocks.{block}.{side}.weight"] for side in ("up", "down"))
        u = u + F.relu(u @ up.T) @ down.T
    return words + u @ weights[prefix + "project_out.weight"].T if projected else u


def encode_plainly(head: QINCo2, x: Tensor, candidates: int, beam: int) -> Tensor:
    """Search one vector at a time with lists of (error, codes, reconstruction), in float64."""
    z = (x.double() - head.offset.double()) / head.scale.double()
    books, shortlists = head.codebooks.detach().double(), head.shortlists.detach().double()
    first = len(books) - len(shortlists)
    rows = []
    for row in z:
        codes: tuple[int, ...] = ()
        total = torch.zeros(D, dtype=torch.float64)
        if head.centroids is not None:
            codes = (int((head.centroids.double() - row).square().sum(1).argmin()),)
            total = head.centroids.double()[codes[0]]
        kept = [(0.0, codes, total)]
        for step, words in enumerate(books):
            extended = []
            wanted = max(candidates, beam) if step == 0 else candidates
            for _, codes, total in kept:
                order = torch.arange(len(words))
                if step >= first:
                    near = (row - total - shortlists[step - first]).square().sum(1)
                    order = near.argsort()[:wanted]
                for code in order.tolist():
                    new = total + step_as_published(head, step, words[code], total)
                    extended.append((float((row - new).square().sum()), (*codes, code), new))
            kept = sorted(extended, key=lambda entry: entry[0])[: 1 if step == len(books) - 1 else beam]
        rows.append(kept[0][1])
    return torch.tensor(rows)


VARIANTS: dict[str, dict[str, Any]] = {
    "projected": {},
    "as wide as the vectors": {"width": D},
    "lists": {"num_lists": 5},
    "greedy with candidates": {"beam": 1},
    "beam over all": {"candidates": K, "beam": 2},
    "one block": {"num_blocks": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_encoder_chooses_what_a_plain_beam_search_does(variant: str) -> None:
    head = make_qinco2(0, **{"candidates": 3, "beam": 4} | VARIANTS[variant])
    x = 2 * rand(12, D, seed=1)
    expected = encode_plainly(head, x, head.config.candidates, head.config.beam)
    assert torch.equal(head.encode(x), expected)


def test_no_vectors_have_no_codes() -> None:
    assert make_qinco2(0).encode(torch.empty(0, D)).shape == (0, M)


@pytest.mark.parametrize("width", [10, D])
@pytest.mark.parametrize("seed", SEEDS)
def test_all_candidates_and_one_hypothesis_are_the_greedy_choice(width: int, seed: int) -> None:
    head = make_qinco2(seed, width=width, candidates=K, beam=1)
    x = 2 * rand(60, D, seed=seed + 10)
    z = head.standardize(x).double()
    context, codes = torch.zeros_like(z), []
    for step, words in enumerate(head.codebooks.detach().double()):
        pairs = [step_as_published(head, step, word.expand_as(z), context) for word in words]
        errors = torch.stack([(z - context - pair).square().sum(1) for pair in pairs], 1)
        codes.append(errors.argmin(1))
        context = context + torch.stack(pairs, 1)[torch.arange(len(z)), codes[-1]]
    assert torch.equal(head.encode(x), torch.stack(codes, 1))


def mean_error(head: QINCo2, x: Tensor, **widths: int) -> float:
    """Return the error of the same weights with another width of the search."""
    options = SIZES | {"num_codebooks": head.config.num_codebooks} | widths
    other = QINCo2Config(**options).build(D)
    other.load_state_dict(head.state_dict())
    with torch.no_grad():
        return float((x - other.decode(other.encode(x))).square().sum(1).mean())


def decodable(head: QINCo2, count: int, seed: int) -> Tensor:
    """Return vectors near to what random codes decode to, where it pays to search."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(K, (count, head.num_codes), generator=generator)
    return head.decode(codes).detach() + 0.5 * rand(count, D, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_mean_error_does_not_rise_with_the_beam(seed: int) -> None:
    head = make_qinco2(seed)
    x = decodable(head, 600, seed + 10)
    errors = [mean_error(head, x, candidates=K, beam=beam) for beam in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.97 * errors[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_mean_error_does_not_rise_with_the_candidates(seed: int) -> None:
    head = make_qinco2(seed)
    x = decodable(head, 600, seed + 10)
    errors = [mean_error(head, x, candidates=candidates, beam=1) for candidates in (1, 2, 4, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.97 * errors[0]


@pytest.mark.parametrize("width", [10, D])
def test_a_fresh_start_is_the_residual_quantizer_searched_by_a_beam(width: int) -> None:
    x = rand(500, D, seed=0) + 3
    options = SIZES | {"width": width, "candidates": K, "beam": 5}
    head = QINCo2Config(**options).build(D)
    head.warm_start(x, FaissFit(), 0)
    z = head.standardize(x)
    codes = beam_search(z, head.codebooks, 5)
    assert torch.equal(head.encode(x), codes)
    total = head.books.select(codes).sum(1)
    torch.testing.assert_close(head.standardize(head.decode(codes)), total, rtol=1e-4, atol=1e-4)


def test_the_released_start_of_the_output_projection_destroys_the_residual_quantizer() -> None:
    x = rand(500, D, seed=0)
    errors = []
    for zero in (True, False):
        torch.manual_seed(0)
        head = QINCo2Config(**SIZES, candidates=1, beam=1, pout_zero_init=zero).build(D)
        head.warm_start(x, FaissFit(), 0)
        errors.append(mean_error(head, x, candidates=1, beam=1))
    assert errors[1] > 1.2 * errors[0]


def test_vectors_are_standardized_by_their_mean_and_one_deviation() -> None:
    x = rand(500, D, seed=0) * torch.linspace(1, 3, D) + 5
    head = QINCo2Config(**SIZES).build(D)
    head.warm_start(x, FaissFit(), 0)
    z = head.standardize(x).double()
    assert z.mean(0).abs().max().item() < 1e-5
    assert z.square().mean().item() == pytest.approx(1.0, rel=1e-3)
    torch.testing.assert_close(head.restore(head.standardize(x)), x)


def test_candidates_start_from_the_same_noisy_codewords() -> None:
    x = rand(500, D, seed=0)
    heads = [QINCo2Config(**SIZES, start_noise=noise).build(D) for noise in (0.0, 0.1)]
    for head in heads:
        head.warm_start(x, FaissFit(), 0)
        assert torch.equal(head.shortlists, head.codebooks[1:])
    ratio = (heads[1].codebooks - heads[0].codebooks).std((1, 2)) / heads[0].codebooks.std((1, 2))
    np.testing.assert_allclose(ratio.detach(), 0.1, rtol=0.2)


@pytest.mark.parametrize("lists", [0, 5])
def test_the_loss_of_the_short_lists_is_that_of_the_paper(lists: int) -> None:
    head = make_qinco2(0, num_lists=lists, distortion_weight=0.5)
    x = 2 * rand(40, D, seed=1)
    output = head(x)
    z, steps = head.standardize(x), head.reconstructions(output.codes)
    expected, before = 0.0, head.centroids[output.codes[:, 0]] if lists else None
    for step, (code, after) in enumerate(zip(output.codes[:, bool(lists) :].T, steps, strict=True)):
        if before is not None:
            near = head.shortlists[step if lists else step - 1][code]
            expected += (before + near - z).square().mean().item()
        before = after
    assert output.losses["preselection"].item() == pytest.approx(0.5 * expected, rel=1e-5)
    gradients = torch.autograd.grad(
        output.losses["preselection"], [head.shortlists, head.codebooks], allow_unused=True
    )
    assert gradients[0].abs().sum() > 0
    assert gradients[1] is None


def test_evaluation_searches_as_wide_as_it_is_told() -> None:
    head = make_qinco2(0, candidates=1, beam=1, eval_candidates=8, eval_beam=4)
    x = 2 * rand(12, D, seed=1)
    assert torch.equal(head.encode(x), encode_plainly(head, x, 1, 1))
    assert torch.equal(head.eval().encode(x), encode_plainly(head, x, 8, 4))


def test_unused_codewords_are_restarted_in_both_codebooks() -> None:
    head = make_qinco2(0, restart_window=1.0)
    x = 2 * rand(60, D, seed=1)
    head.count(head.encode(x))
    dead, before = head.books.usage == 0, head.shortlists.detach().clone()
    assert dead[1:].any()
    masks = head.restart_dead_codes(x, torch.Generator().manual_seed(0))
    assert torch.equal(masks[head.codebooks], dead)
    assert torch.equal(masks[head.shortlists], dead[1:])
    assert torch.equal(head.shortlists[dead[1:]], head.codebooks[1:][dead[1:]])
    assert torch.equal(head.shortlists[~dead[1:]], before[~dead[1:]])


@pytest.mark.parametrize("lists", [0, 5])
def test_the_first_codes_are_codes_of_the_truncated_head(lists: int) -> None:
    head = make_qinco2(0, num_lists=lists)
    codes = head.encode(2 * rand(40, D, seed=1))
    short = head.truncated(2)
    expected = head.restore(head.reconstructions(codes)[1])
    torch.testing.assert_close(short.decode(codes[:, : 2 + bool(lists)]), expected, rtol=0, atol=0)
    assert torch.equal(short.shortlists, head.shortlists[: 1 + bool(lists)])


@pytest.mark.parametrize(
    ("preset", "dim", "millions"), [("S", 128, 1.64), ("M", 128, 10.8), ("L", 128, 35.6), ("S", 768, 6.05)]
)
def test_a_preset_has_the_published_number_of_parameters(preset: str, dim: int, millions: float) -> None:
    with torch.device("meta"):
        head = QINCo2Config(preset=preset, num_codebooks=8).build(dim)
    found = sum(parameter.numel() for parameter in head.parameters()) / 1e6
    assert found == pytest.approx(millions, rel=0.01)


def test_an_explicit_size_overrides_its_part_of_the_preset() -> None:
    config = QINCo2Config(preset="M", hidden=7)
    assert [config.size(name) for name in ("num_blocks", "width", "hidden")] == [4, 384, 7]


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"candidates": 0}, r"candidates must be at least 1, got 0"),
        ({"eval_beam": 0}, r"eval_beam must be at least 1, got 0"),
        ({"width": 0}, r"width must be at least 1, got 0"),
        ({"preset": "XL"}, r"preset must be one of S, M, L, got 'XL'"),
        ({"start_noise": -0.1}, r"start_noise must be zero or more, got -0\.1"),
    ],
)
def test_a_value_outside_its_range_is_refused(options: dict[str, Any], fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        QINCo2Config(**options)
