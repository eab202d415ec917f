"""Texts of like length are encoded together, with the vectors of one padded batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from retriever import DualEncoder
from retriever.dual_encoder import encode_by_length, length_groups


def mask_of(lengths: list[int], width: int) -> Tensor:
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).long()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_vectors_and_gradients_are_those_of_the_padded_batch(
    tiny_dual_encoder: DualEncoder, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = mask_of(torch.randint(2, 33, (40,), generator=generator).tolist(), 33)
    mask[7] = 1  # the longest
    tokens = {
        "input_ids": torch.randint(5, 120, mask.shape, generator=generator) * mask,
        "attention_mask": mask,
    }
    assert len(length_groups(mask)) == 4
    encoder, found = tiny_dual_encoder.document_encoder.eval(), []
    upstream = torch.randn(40, 32, generator=generator)
    for encode in (encoder, lambda t: encode_by_length(encoder, t)):
        encoder.zero_grad()
        vectors = encode(tokens)
        vectors.backward(upstream)
        gradients = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
        found.append((vectors.detach(), gradients))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-6)
    for one, other in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_groups_hold_every_row_once_and_all_of_its_tokens(seed: int) -> None:
    lengths = torch.randint(1, 100, (50,), generator=torch.Generator().manual_seed(seed))
    groups = length_groups(mask_of(lengths.tolist(), 120))
    assert sorted(torch.cat([rows for rows, _ in groups]).tolist()) == list(range(50))
    assert all(int(lengths[rows].max()) == length for rows, length in groups)


def test_texts_of_one_length_stay_together() -> None:
    assert len(length_groups(mask_of([20] * 64, 20))) == 1


def test_few_texts_stay_together() -> None:
    assert len(length_groups(mask_of([1] * 30 + [100], 100))) == 1


def test_left_padding_is_left_alone() -> None:
    assert len(length_groups(mask_of([1] * 63 + [100], 100).flip(1))) == 1
