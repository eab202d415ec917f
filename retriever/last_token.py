"""What a tokenizer must do for a decoder whose last token stands for the text.

Shapes: none; texts become lists of token ids.
"""

from __future__ import annotations

from typing import Any

from tokenizers.processors import Sequence, TemplateProcessing

from retriever.errors import InputError

__all__ = ["append_end_token"]


def append_end_token(tokenizer: Any) -> None:
    """Make a transformers tokenizer put its end-of-sequence token behind every text, unless it does already.

    Only that token is at the same place of every text and has seen all of it. It is made part of the tokenizer's own
    post-processing, so that it is saved with it and every library puts it there; a text that is cut keeps it.

    Raises:
        InputError: If the tokenizer is not one of the library tokenizers.
    """
    end = tokenizer.eos_token
    if end is None or tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]:
        return
    if not tokenizer.is_fast:
        raise InputError(
            f"pooling last needs a tokenizer of the library tokenizers, to which an end token can be added; got "
            f"{type(tokenizer).__name__}. Take a model whose folder has a tokenizer.json, or pooling mean."
        )
    backend = tokenizer.backend_tokenizer
    end_last = TemplateProcessing(
        single=f"$A {end}", pair=f"$A $B {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    before = backend.post_processor
    backend.post_processor = end_last if before is None else Sequence([before, end_last])
