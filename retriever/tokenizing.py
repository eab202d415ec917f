"""Texts -> token ids and mask, by the library tokenizers.

Shapes: B texts, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from retriever.data import Tokens

__all__ = ["bag_tokens", "pad_tokens", "transformer_tokens"]


def transformer_tokens(tokenizer: Any, texts: Sequence[str], max_length: int) -> Tokens:
    """Return what a fast tokenizer of transformers returns for texts, padded on the right, in a fraction of its time.

    It makes tensors of Python lists number by number, which keeps a GPU waiting. Token types are left out where all are
    0, as models take them to be.
    """
    backend = tokenizer.backend_tokenizer
    side = tokenizer.truncation_side
    cut = {"max_length": max_length, "stride": 0, "strategy": "longest_first", "direction": side}
    if backend.truncation != cut:  # a change while another thread tokenizes is an error
        backend.enable_truncation(**cut)
    if backend.padding is not None:
        backend.no_padding()
    encodings = backend.encode_batch_fast(texts)
    tokens = pad_tokens([encoding.ids for encoding in encodings], tokenizer.pad_token_id)
    if "token_type_ids" in tokenizer.model_input_names and any(any(e.type_ids) for e in encodings[:1]):
        types = [encoding.type_ids for encoding in encodings]
        tokens["token_type_ids"] = pad_tokens(types, tokenizer.pad_token_type_id)["input_ids"]
    return tokens


def bag_tokens(tokenizer: Tokenizer, texts: Sequence[str], max_length: int) -> Tokens:
    """Return ids and mask, (B, L), of the first `max_length` tokens of each text, without special tokens.

    L is at least 1. The tokenizer is not told the length: towers and threads share it.
    """
    encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return pad_tokens([encoding.ids[:max_length] for encoding in encodings])


def pad_tokens(ids: Sequence[list[int]], padding: int = 0) -> Tokens:
    """Return ids and mask, (B, L), of the token ids of each text, padded on the right; L is at least 1."""
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    mask = np.arange(max(1, lengths.max(initial=0))) < lengths[:, None]  # (B, L)
    padded = np.full(mask.shape, padding, dtype=np.int64)
    padded[mask] = np.fromiter(chain.from_iterable(ids), dtype=np.int64, count=lengths.sum())
    return {"input_ids": torch.from_numpy(padded), "attention_mask": torch.from_numpy(mask.astype(np.int64))}
