"""An embedding depends on its text, prompt and settings only; faulty models are named with a remedy.

Shapes: B texts, L tokens, D dimensions.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from retriever import Encoder, EncoderSettings, InputError
from retriever.encoder import pool, resolve_model

POOLINGS = ("cls", "mean", "last")
TEXTS = ["w1", "w2 w3 w4 w5 w6 w7 w8", "w9 w10 w11", "w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 w12"]


def padded(side: str, seed: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return hidden states (B, L, D) with noise in the padding, the mask, and each text's own states (l, D)."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [1, 4, 7, 2]
    hidden = torch.randn(len(lengths), 7, 5, generator=generator)
    mask = torch.zeros(len(lengths), 7, dtype=torch.int64)
    texts = []
    for row, length in enumerate(lengths):
        columns = slice(0, length) if side == "right" else slice(7 - length, 7)
        mask[row, columns] = 1
        texts.append(hidden[row, columns])
    return hidden, mask, texts


def pool_one(states: Tensor, pooling: str) -> Tensor:
    rows = list(states.double())
    return {"cls": rows[0], "last": rows[-1], "mean": sum(rows) / len(rows)}[pooling]


@pytest.fixture
def left_padding_model(tiny_model: Path, tmp_path: Path) -> Path:
    """A Llama of 2 layers whose tokenizer pads on the left; its rotary positions are relative."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=125,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    LlamaModel(config).save_pretrained(tmp_path / "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, tmp_path / "llama" / name)
    path = tmp_path / "llama" / "tokenizer_config.json"
    changes = {"padding_side": "left", "model_input_names": ["input_ids", "attention_mask"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")
    return tmp_path / "llama"


@pytest.fixture
def edited(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Save the tiny model as a sentence-transformers folder with some of its JSON files replaced."""

    def edit(**files: Any) -> Path:
        folder = tmp_path / "edited"
        Encoder.load(tiny_model).save(folder)
        for name, value in files.items():
            path = folder / name.replace("__", "/")
            path.with_suffix(".json").write_text(json.dumps(value), encoding="utf-8")
        return folder

    return edit


def embed(encoder: Encoder, texts: list[str], prompt: str = "") -> Tensor:
    with torch.no_grad():
        return encoder.eval()(encoder.tokenize(texts, prompt))


# --- tokens ---


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("length", [3, 8, 60])
@pytest.mark.parametrize("kind", ["bert", "bert with an end token", "llama", "llama with token types"])
def test_tokens_are_those_of_transformers(
    tiny_model: Path, left_padding_model: Path, kind: str, length: int, side: str
) -> None:
    """Whatever is cut, on the side that the tokenizer's settings name."""
    encoder = Encoder.load(
        left_padding_model if "llama" in kind else tiny_model,
        max_length=length,
        pooling="last" if "end" in kind else "mean",
    )
    tokenizer = encoder.tokenizer
    tokenizer.truncation_side = side
    if "types" in kind:
        typed = TemplateProcessing(
            single="$A:0 w9:2", special_tokens=[("w9", tokenizer("w9")["input_ids"][0])]
        )
        tokenizer.backend_tokenizer.post_processor = typed
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    texts = [*TEXTS, "", "w1", "w3 " * 40, "unknown w2"]
    expected = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
    tokens = encoder.tokenize(texts)
    types = expected.pop("token_type_ids", torch.zeros(1))
    assert set(tokens) - {"token_type_ids"} == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(tokens[name], value, rtol=0, atol=0)
    if types.any():
        torch.testing.assert_close(tokens["token_type_ids"], types, rtol=0, atol=0)
    assert ("token_type_ids" in tokens) == ("types" in kind)


# --- pooling ---


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("pooling", "side"),
    [("cls", "right"), ("mean", "right"), ("mean", "left"), ("last", "right"), ("last", "left")],
)
def test_pooled_vector_is_that_of_the_text_without_padding(pooling: str, side: str, seed: int) -> None:
    hidden, mask, texts = padded(side, seed)
    expected = torch.stack([pool_one(states, pooling) for states in texts])
    torch.testing.assert_close(pool(hidden, mask, pooling).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_embedding_does_not_depend_on_the_other_texts_of_the_batch(
    tiny_model: Path, pooling: str, normalize: bool
) -> None:
    encoder = Encoder.load(tiny_model, pooling=pooling, normalize=normalize)
    alone = torch.cat([embed(encoder, [text]) for text in TEXTS])
    torch.testing.assert_close(embed(encoder, TEXTS), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_embedding_does_not_depend_on_left_padding(left_padding_model: Path, pooling: str) -> None:
    encoder = Encoder.load(left_padding_model, pooling=pooling, normalize=False)
    tokens = dict(encoder.tokenizer(TEXTS, padding=True, padding_side="left", return_tensors="pt"))
    assert tokens["attention_mask"][0, 0] == 0, "it is padded on the left"
    alone = torch.cat([embed(encoder, [text]) for text in TEXTS])
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(tokens), alone, rtol=0, atol=1e-5)


def test_poolings_differ(tiny_model: Path) -> None:
    vectors = [embed(Encoder.load(tiny_model, pooling=pooling), TEXTS) for pooling in POOLINGS]
    assert all((vectors[a] - vectors[b]).abs().max() > 1e-3 for a, b in [(0, 1), (0, 2), (1, 2)])


def test_normalized_embedding_has_unit_length(tiny_model: Path) -> None:
    norms = embed(Encoder.load(tiny_model, normalize=True), TEXTS).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(4), rtol=0, atol=1e-6)


def test_embedding_without_normalization_points_the_same_way(tiny_model: Path) -> None:
    unit = embed(Encoder.load(tiny_model, normalize=True), TEXTS)
    free = embed(Encoder.load(tiny_model, normalize=False), TEXTS)
    torch.testing.assert_close(free / free.norm(dim=1, keepdim=True), unit, rtol=0, atol=1e-6)
    assert (free.norm(dim=1) - 1).abs().min() > 0.1


# --- prompts and lengths ---


def test_prompt_is_put_before_the_text(tiny_model: Path) -> None:
    encoder = Encoder.load(tiny_model)
    prompted = encoder.tokenize(["w5 w6", "w7"], "w1 w2 ")
    written = encoder.tokenize(["w1 w2 w5 w6", "w1 w2 w7"])
    assert torch.equal(prompted["input_ids"], written["input_ids"])


def test_text_is_cut_at_max_length_with_prompt_and_special_tokens(tiny_model: Path) -> None:
    encoder = Encoder.load(tiny_model, max_length=6)
    ids = encoder.tokenize([TEXTS[-1]], "w20 ")["input_ids"]
    assert encoder.tokenizer.convert_ids_to_tokens(ids[0]) == ["[CLS]", "w20", "w1", "w2", "w3", "[SEP]"]


def test_saving_another_encoder_of_the_same_tokenizer_does_not_change_the_length(
    tiny_model: Path, tmp_path: Path
) -> None:
    encoder = Encoder.load(tiny_model, max_length=20)
    encoder.with_settings(max_length=4).save(tmp_path / "short")
    assert encoder.tokenize([TEXTS[-1]])["input_ids"].shape == (1, 14)


# --- settings ---


def test_plain_transformer_gets_the_default_settings(tiny_model: Path) -> None:
    assert Encoder.load(tiny_model, max_length=20).settings == EncoderSettings(max_length=20)


def test_setting_that_is_none_keeps_the_saved_one(tiny_model: Path, tmp_path: Path) -> None:
    Encoder.load(tiny_model, pooling="cls", query_prompt="w1 ").save(tmp_path / "model")
    loaded = Encoder.load(tmp_path / "model", pooling=None, query_prompt=None)
    assert (loaded.settings.pooling, loaded.settings.query_prompt) == ("cls", "w1 ")


def test_given_setting_overrides_the_saved_one(tiny_model: Path, tmp_path: Path) -> None:
    Encoder.load(tiny_model, pooling="cls", normalize=True, query_prompt="w1 ").save(tmp_path / "model")
    loaded = Encoder.load(tmp_path / "model", pooling="last", normalize=False, max_length=9, query_prompt="")
    assert loaded.settings == EncoderSettings(pooling="last", normalize=False, max_length=9)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_saved_encoder_is_loaded_with_equal_settings(
    tiny_model: Path, tmp_path: Path, pooling: str, normalize: bool
) -> None:
    settings = EncoderSettings(
        pooling=pooling, normalize=normalize, max_length=17, query_prompt="w1 ", document_prompt="w2: "
    )
    Encoder.load(tiny_model).with_settings(
        **{field: getattr(settings, field) for field in settings.__slots__}
    ).save(tmp_path / "model")
    assert Encoder.load(tmp_path / "model").settings == settings


def test_saved_encoder_gives_equal_embeddings(tiny_model: Path, tmp_path: Path) -> None:
    encoder = Encoder.load(tiny_model, pooling="cls")
    encoder.save(tmp_path / "model")
    assert torch.equal(embed(Encoder.load(tmp_path / "model"), TEXTS), embed(encoder, TEXTS))


def test_encoders_with_other_settings_share_the_weights(tiny_model: Path) -> None:
    encoder = Encoder.load(tiny_model)
    assert encoder.with_settings(max_length=8).backbone is encoder.backbone


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooling": "max"}, r"pooling must be one of cls, mean, last, got 'max'"),
        ({"max_length": 1}, r"max_length must be at least 2 tokens, got 1"),
    ],
)
def test_faulty_setting_is_refused_with_its_value(
    tiny_model: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Encoder.load(tiny_model, **changes)


# --- models that cannot be loaded ---


def test_model_of_a_missing_package_names_the_package_to_install() -> None:
    with pytest.raises(InputError, match=r"'no_such_pkg', which is not installed: pip install no-such-pkg"):
        Encoder.load("package:no_such_pkg/model")


def test_model_of_a_missing_folder_in_a_package_names_the_folder() -> None:
    with pytest.raises(InputError, match=r"retriever/no_such_model is not a folder"):
        Encoder.load("package:retriever/no_such_model")


@pytest.mark.parametrize("model", ["package:", "package:/model", "package:no_such_pkg.part/model"])
def test_malformed_package_model_is_an_input_error(model: str) -> None:
    with pytest.raises(InputError, match="package"):
        Encoder.load(model)


def test_model_of_a_package_is_its_folder(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny_package_for_a_test").mkdir()
    (tmp_path / "tiny_package_for_a_test" / "__init__.py").touch()
    shutil.copytree(tiny_model, tmp_path / "tiny_package_for_a_test" / "files")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = resolve_model("package:tiny_package_for_a_test/files")
    assert found == str(tmp_path / "tiny_package_for_a_test" / "files")


def test_name_without_a_scheme_is_left_as_it_is() -> None:
    assert resolve_model("some/model") == "some/model"


def test_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"the model '{tmp_path}' cannot be loaded"):
        Encoder.load(tmp_path)


# --- sentence-transformers folders ---


@pytest.mark.parametrize("kind", ["Dropout", "WeightedLayerPooling", "Router"])
def test_module_that_endex_does_not_carry_is_refused_by_name(edited: Callable[..., Path], kind: str) -> None:
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": f"2_{kind}", "type": f"sentence_transformers.models.{kind}"},
    ]
    with pytest.raises(InputError, match=rf"module '{kind}' after its transformer"):
        Encoder.load(edited(modules=modules))


@pytest.mark.parametrize(("written", "pooling"), [("cls", "cls"), ("mean", "mean"), ("lasttoken", "last")])
def test_compact_pooling_schema_is_read(edited: Callable[..., Path], written: str, pooling: str) -> None:
    config = {"embedding_dimension": 32, "pooling_mode": written, "include_prompt": True}
    assert Encoder.load(edited(**{"1_Pooling__config": config})).settings.pooling == pooling


@pytest.mark.parametrize(
    ("flag", "pooling"),
    [
        ("pooling_mode_cls_token", "cls"),
        ("pooling_mode_mean_tokens", "mean"),
        ("pooling_mode_lasttoken", "last"),
    ],
)
def test_legacy_pooling_flags_are_read(edited: Callable[..., Path], flag: str, pooling: str) -> None:
    config = {"word_embedding_dimension": 32, "pooling_mode_max_tokens": False, flag: True}
    assert Encoder.load(edited(**{"1_Pooling__config": config})).settings.pooling == pooling


@pytest.mark.parametrize(
    "config",
    [
        {"pooling_mode": "weightedmean"},
        {"pooling_mode": ["cls", "mean"]},
        {"pooling_mode_max_tokens": True},
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
    ],
    ids=repr,
)
def test_pooling_that_endex_does_not_know_is_refused(
    edited: Callable[..., Path], config: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match=r"pools by .*; Endex knows"):
        Encoder.load(edited(**{"1_Pooling__config": config}))


def test_pooling_that_leaves_the_prompt_out_is_refused(edited: Callable[..., Path]) -> None:
    """Endex pools over the prompt, too, so the vectors of such a model would silently differ."""
    config = {"pooling_mode": "mean", "include_prompt": False}
    prompts = {"prompts": {"query": "query: "}}
    with pytest.raises(InputError, match="prompt"):
        Encoder.load(edited(**{"1_Pooling__config": config, "config_sentence_transformers": prompts}))


def test_passage_prompt_is_read_as_the_document_prompt(edited: Callable[..., Path]) -> None:
    config = {"prompts": {"query": "query: ", "passage": "passage: "}}
    settings = Encoder.load(edited(config_sentence_transformers=config)).settings
    assert (settings.query_prompt, settings.document_prompt) == ("query: ", "passage: ")


def test_file_that_is_not_json_is_named(edited: Callable[..., Path]) -> None:
    folder = edited()
    (folder / "1_Pooling" / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"1_Pooling/config\.json is not JSON"):
        Encoder.load(folder)


def test_module_list_that_is_not_json_is_named(edited: Callable[..., Path]) -> None:
    folder = edited()
    (folder / "modules.json").write_text("[", encoding="utf-8")
    with pytest.raises(InputError, match=r"modules\.json"):
        Encoder.load(folder)


def test_resolve_model_imports_no_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "package_that_fails_on_import"
    (package / "files").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resolve_model("package:package_that_fails_on_import/files") == str(package / "files")
