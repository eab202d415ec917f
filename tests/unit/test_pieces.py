"""Heads encode alike in the pieces that suit a CPU and in the large ones of a card."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from index import FaissFit
from retriever.heads import HEADS, cells, pieces, residual

HEAD_OPTIONS: dict[str, dict[str, Any]] = {
    "pq": {"num_codebooks": 4, "codebook_bits": 4},
    "rq": {"num_codebooks": 3, "codebook_bits": 4, "beam": 4},
    "qinco2": {"num_codebooks": 3, "codebook_bits": 4, "candidates": 4, "beam": 3, "hidden": 8},
    "cnt": {},
    "ivfpq": {"num_lists": 64, "num_codebooks": 4, "codebook_bits": 4, "list_structure": "gno_imi"},
}


@pytest.mark.parametrize("name", HEAD_OPTIONS)
def test_the_codes_do_not_depend_on_the_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3000, 16, generator=torch.Generator().manual_seed(3))
    head = HEADS[name](**HEAD_OPTIONS[name]).build(16).eval()
    head.warm_start(x[:1000], FaissFit(), seed=0)
    for module in (residual, cells):
        monkeypatch.setattr(module, "TABLE", 4096)  # several pieces even of so few vectors
    few = head.encode(x)
    monkeypatch.setattr(pieces, "on_cpu", lambda _: False)
    many = head.encode(x)
    if few.is_floating_point():
        torch.testing.assert_close(many, few, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(many, few)
