"""Packed codes are the bytes that FAISS itself writes, and unpacking inverts packing."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retriever.heads import pack_codes, unpack_codes

BITS = (4, 5, 6, 8, 10, 12, 16)
SEEDS = (0, 1)


def random_codes(rows: int, num_codes: int, code_bits: int, seed: int) -> Tensor:
    """Return random codes, the smallest and the largest one among them."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**code_bits, (rows, num_codes), generator=generator)
    codes[0, 0], codes[-1, -1] = 0, 2**code_bits - 1
    return codes


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("code_bits", BITS)
def test_bytes_are_those_of_the_faiss_bitstring_writer(code_bits: int, seed: int) -> None:
    codes = random_codes(11, 7, code_bits, seed)
    expected = faiss.pack_bitstrings(codes.numpy().astype(np.int32), code_bits)
    np.testing.assert_array_equal(pack_codes(codes, code_bits), expected)


@pytest.mark.parametrize("code_bits", BITS)
def test_bytes_are_those_of_the_faiss_product_quantizer(code_bits: int) -> None:
    """With codeword k at the point k of a line, the vector (3, 0, 7) has the codes 3, 0, 7."""
    codes = random_codes(6, 3, code_bits, seed=2)
    index = faiss.IndexPQ(3, 3, code_bits)
    line = np.tile(np.arange(2**code_bits, dtype=np.float32), 3)
    faiss.copy_array_to_vector(line, index.pq.centroids)
    index.is_trained = True
    expected = index.sa_encode(codes.numpy().astype(np.float32))
    np.testing.assert_array_equal(pack_codes(codes, code_bits), expected)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    code_bits=st.integers(1, 16),
    num_codes=st.integers(1, 12),
    rows=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
)
def test_unpacking_inverts_packing(code_bits: int, num_codes: int, rows: int, seed: int) -> None:
    codes = random_codes(rows, num_codes, code_bits, seed)
    assert torch.equal(unpack_codes(pack_codes(codes, code_bits), num_codes, code_bits), codes)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(code_bits=st.integers(1, 16), num_codes=st.integers(1, 12))
def test_row_has_as_many_whole_bytes_as_its_bits_need(code_bits: int, num_codes: int) -> None:
    packed = pack_codes(random_codes(3, num_codes, code_bits, seed=0), code_bits)
    assert packed.shape == (3, -(-code_bits * num_codes // 8))


@pytest.mark.parametrize("seed", SEEDS)
def test_codes_of_32_bits_are_packed_as_the_floats_they_are_the_bits_of(seed: int) -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
    packed = pack_codes(x.view(torch.int32), 32)
    np.testing.assert_array_equal(packed, x.numpy().astype("<f4").view(np.uint8))


@pytest.mark.parametrize("seed", SEEDS)
def test_unpacking_codes_of_32_bits_inverts_packing(seed: int) -> None:
    codes = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed)).view(torch.int32)
    assert torch.equal(unpack_codes(pack_codes(codes, 32), 6, 32), codes)


@pytest.mark.parametrize("code_bits", [5, 8])
def test_rows_of_a_read_only_map_can_be_unpacked(code_bits: int) -> None:
    codes = random_codes(9, 5, code_bits, seed=0)
    packed = pack_codes(codes, code_bits)
    packed.flags.writeable = False
    assert torch.equal(unpack_codes(packed[2:7], 5, code_bits), codes[2:7])
