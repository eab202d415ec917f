"""Backbones: decoders pooled by their last token, adapters, projections, recomputed and compiled layers.

Shapes: B texts, L tokens, D dimensions.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Model,
    Qwen2Tokenizer,
)

from retriever import Document, DualEncoder, DualEncoderConfig, Encoder, InputError, LoraConfig
from retriever.backbone import recompute_layers
from retriever.dual_encoder import encode_by_length
from retriever.heads import NoCompressionConfig, ProductQuantizerConfig
from training import Experiment
from training.experiment import DataConfig, OptimizationConfig
from training.losses import ContrastiveConfig

TEXTS = ["w1", "w2 w3 w4 w5 w6 w7 w8", "w9 w10 w11", "w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 w12"]
VOCABULARY = {"<eos>": 0, "<s>": 1, "<unk>": 2, **{f"w{i}": i + 3 for i in range(120)}}
SIZE: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "qwen2": lambda: Qwen2Model(Qwen2Config(**SIZE)),
    "llama": lambda: LlamaModel(LlamaConfig(**SIZE)),
    "gpt2": lambda: GPT2Model(GPT2Config(vocab_size=len(VOCABULARY), n_embd=32, n_layer=2, n_head=2)),
}


def save_decoder(folder: Path, kind: str, *, bos: bool = False, side: str = "left") -> Path:
    """Save a random decoder whose tokenizer, as those of most, ends no text and has no padding token."""
    torch.manual_seed(0)
    MODELS[kind]().save_pretrained(folder)
    if kind == "qwen2":  # a class of its own, which reads bytes
        characters = {character: row + 3 for row, character in enumerate("w0123456789Ġ")}
        vocabulary = {"<eos>": 0, "<unk>": 2, **characters}
        Qwen2Tokenizer(vocab=vocabulary, merges=[], eos_token="<eos>").save_pretrained(folder)
        return folder
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        bos_token="<s>",
        unk_token="<unk>",
        padding_side=side,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=list(MODELS))
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp(request.param) / "model", request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("llama") / "model", "llama")


def embed(encoder: Encoder, texts: list[str]) -> Tensor:
    with torch.no_grad():
        return encoder.eval()(encoder.tokenize(texts))


def close(found: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


# --- decoders ---


def test_a_decoders_vector_is_the_state_of_an_end_token_behind_the_text(decoder: Path) -> None:
    """By transformers alone: one text without padding, its ids and the end token's."""
    backbone = AutoModel.from_pretrained(decoder).eval()
    ids = AutoTokenizer.from_pretrained(decoder)(TEXTS[1])["input_ids"] + [VOCABULARY["<eos>"]]
    assert len(ids) > 7
    with torch.no_grad():
        expected = backbone(torch.tensor([ids])).last_hidden_state[:, -1]
    close(embed(Encoder.load(decoder, pooling="last", normalize=False), TEXTS)[1:2], expected)


def test_a_decoders_vector_does_not_depend_on_the_other_texts(decoder: Path) -> None:
    """Also where positions are absolute and the tokenizer would pad on the left (gpt2)."""
    encoder = Encoder.load(decoder, pooling="last", normalize=False)
    close(embed(encoder, TEXTS), torch.cat([embed(encoder, [text]) for text in TEXTS]))


def test_a_decoder_gives_the_same_vectors_in_sentence_transformers(decoder: Path, tmp_path: Path) -> None:
    encoder = Encoder.load(decoder, pooling="last", max_length=9)
    encoder.save(tmp_path / "model")
    theirs = SentenceTransformer(str(tmp_path / "model"), device="cpu").encode(TEXTS, convert_to_tensor=True)
    close(embed(encoder, TEXTS), theirs)


def test_a_saved_decoder_is_loaded_with_its_end_token_once(decoder: Path, tmp_path: Path) -> None:
    encoder = Encoder.load(decoder, pooling="last")
    encoder.save(tmp_path / "model")
    loaded = Encoder.load(tmp_path / "model")
    assert torch.equal(loaded.tokenize(TEXTS)["input_ids"], encoder.tokenize(TEXTS)["input_ids"])
    assert torch.equal(embed(loaded, TEXTS), embed(encoder, TEXTS))


@pytest.mark.parametrize("bos", [False, True])
def test_a_text_that_is_cut_keeps_start_and_end_token(tmp_path: Path, bos: bool) -> None:
    encoder = Encoder.load(save_decoder(tmp_path, "llama", bos=bos), pooling="last", max_length=5)
    ids = encoder.tokenize([TEXTS[-1]])["input_ids"]
    expected = ["<s>", "w1", "w2", "w3", "<eos>"] if bos else ["w1", "w2", "w3", "w4", "<eos>"]
    assert encoder.tokenizer.convert_ids_to_tokens(ids[0]) == expected


def test_a_text_equal_to_the_padding_token_is_not_taken_for_padding(decoder: Path) -> None:
    """The end token pads, too, and only the mask tells them apart."""
    encoder = Encoder.load(decoder, pooling="last", normalize=False)
    close(embed(encoder, ["<eos> <eos>", TEXTS[-1]])[:1], embed(encoder, ["<eos> <eos>"]))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_without_last_token_pooling_no_end_token_is_added(llama: Path, pooling: str) -> None:
    ids = Encoder.load(llama, pooling=pooling).tokenize(["w1 w2"])["input_ids"]
    assert ids.tolist() == [[VOCABULARY["w1"], VOCABULARY["w2"]]]


def test_an_end_token_that_the_tokenizer_adds_is_not_added_again(tiny_model: Path) -> None:
    """BERT's separator ends a text and has no other name."""
    ids = Encoder.load(tiny_model, pooling="last").tokenize(["w1 w2"])["input_ids"]
    assert ids.shape == (1, 4)


def test_a_sentence_transformers_models_tokenizer_is_left_as_it_was_trained(
    llama: Path, tmp_path: Path
) -> None:
    Encoder.load(llama, pooling="mean").save(tmp_path / "model")
    ids = Encoder.load(tmp_path / "model", pooling="last").tokenize(["w1 w2"])["input_ids"]
    assert ids.shape == (1, 2)


def test_a_decoder_keeps_no_keys_and_values(llama: Path) -> None:
    encoder = Encoder.load(llama, pooling="last")
    assert encoder.backbone(**encoder.tokenize(TEXTS)).past_key_values is None


def test_a_decoders_texts_are_grouped_by_length(llama: Path) -> None:
    """The tokenizer pads on the left by itself, which groups cannot cut."""
    encoder = Encoder.load(llama, pooling="last", normalize=False).eval()
    texts = ["w1 w2"] * 30 + [" ".join(f"w{i}" for i in range(30))] * 2
    lengths: list[int] = []
    encoder.backbone.register_forward_pre_hook(
        lambda _, __, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    with torch.no_grad():
        grouped = encode_by_length(encoder, encoder.tokenize(texts))
    assert lengths == [3, 3, 3, 31]
    close(grouped, embed(encoder, texts))


# --- adapters ---


def lora_model(folder: Path, **changes: Any) -> DualEncoder:
    """Return a model whose adapters have trained: their second matrices are not zero."""
    torch.manual_seed(1)
    config = DualEncoderConfig(encoder=str(folder), lora=LoraConfig(rank=4, alpha=12), **changes)
    model = config.build(NoCompressionConfig())
    for name, value in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(value, std=0.3)
    return model.eval()


LORA_MODELS = ("bert", "qwen2", "gpt2")


@pytest.fixture(scope="module", params=LORA_MODELS)
def base(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "bert":
        return tiny_model
    return save_decoder(tmp_path_factory.mktemp("base") / "model", request.param)


def test_new_adapters_change_nothing(base: Path) -> None:
    plain, adapted = (
        DualEncoderConfig(encoder=str(base), lora=lora).build(NoCompressionConfig()).query_encoder
        for lora in (None, LoraConfig())
    )
    assert torch.equal(embed(adapted, TEXTS), embed(plain, TEXTS))


def test_only_adapters_and_projection_train(base: Path) -> None:
    model = lora_model(base, projection=8)
    trained = {name for name, value in model.query_encoder.named_parameters() if value.requires_grad}
    assert trained
    assert {name for name in trained if "lora_" not in name} == {"projection.0.weight"}


def test_saved_adapters_are_merged_as_peft_merges_them(base: Path, tmp_path: Path) -> None:
    model = lora_model(base)
    model.save(tmp_path / "model")
    tower = copy.deepcopy(model.query_encoder)
    for module in list(tower.backbone.modules()):
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.merge()
    loaded = DualEncoder.load(tmp_path / "model").query_encoder
    assert not any("lora_" in name for name in loaded.state_dict())
    state = loaded.backbone.state_dict()
    for name, value in tower.backbone.state_dict().items():
        if "lora_" not in name:
            close(state[name.replace(".base_layer.", ".")], value, 1e-6)


def test_saved_adapters_compute_what_they_did_in_training(base: Path, tmp_path: Path) -> None:
    model = lora_model(base)
    plain = DualEncoderConfig(encoder=str(base)).build(NoCompressionConfig())
    assert (embed(model.query_encoder, TEXTS) - embed(plain.query_encoder, TEXTS)).abs().max() > 1e-2
    model.save(tmp_path / "model")
    close(embed(DualEncoder.load(tmp_path / "model").query_encoder, TEXTS), embed(model.query_encoder, TEXTS))


def test_a_tower_with_adapters_gives_the_same_vectors_in_sentence_transformers(
    base: Path, tmp_path: Path
) -> None:
    model = lora_model(base)
    model.save(tmp_path / "model")
    theirs = SentenceTransformer(str(tmp_path / "model" / "encoder"), device="cpu")
    close(embed(model.document_encoder, TEXTS), theirs.encode(TEXTS, convert_to_tensor=True))


def test_saving_leaves_the_training_model_as_it_was(base: Path, tmp_path: Path) -> None:
    """Merging in place and taking out again would round, and a resumed run would differ."""
    model = lora_model(base)
    before = copy.deepcopy(model.state_dict())
    model.save(tmp_path / "model")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # by peft, of transformers
def test_the_adapter_is_saved_beside_for_peft(base: Path, tmp_path: Path) -> None:
    model = lora_model(base)
    model.save(tmp_path / "model")
    folder = tmp_path / "model" / "encoder" / "lora_adapter"
    theirs = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(base), folder).eval()
    tokens = model.query_encoder.tokenize(TEXTS)
    with torch.no_grad():
        found, expected = (
            m(**tokens).last_hidden_state for m in (theirs, model.query_encoder.backbone.eval())
        )
    close(found, expected)


def test_towers_of_their_own_have_adapters_of_their_own(tiny_model: Path) -> None:
    model = lora_model(tiny_model, tie=False)
    assert not torch.equal(*(embed(tower, TEXTS) for tower in (model.query_encoder, model.document_encoder)))


def test_adapters_of_a_bfloat16_model_are_float32_and_its_saved_weights_too(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = lora_model(tiny_model, dtype="bfloat16")
    types = {name.split(".")[-3]: value.dtype for name, value in model.named_parameters() if "query." in name}
    assert (types["lora_A"], types["lora_B"]) == (torch.float32, torch.float32)
    assert torch.bfloat16 in {value.dtype for value in model.parameters()}
    model.save(tmp_path / "model")
    saved = load_file(tmp_path / "model" / "encoder" / "model.safetensors")
    name = "encoder.layer.0.attention.self.query.weight"
    assert saved[name].dtype == torch.float32
    theirs = SentenceTransformer(str(tmp_path / "model" / "encoder"), device="cpu")
    assert next(theirs.parameters()).dtype == torch.float32
    close(embed(model.query_encoder, TEXTS), theirs.encode(TEXTS, convert_to_tensor=True), 2e-2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, r"model\.lora\.rank must be at least 1, got 0"),
        ({"alpha": 0}, r"model\.lora\.alpha must be at least 1, got 0"),
        ({"dropout": 1.0}, r"model\.lora\.dropout must be at least 0 and below 1, got 1\.0"),
        ({"target_modules": "q_proj"}, r"target_modules must be all-linear or a list, got 'q_proj'"),
    ],
)
def test_a_faulty_adapter_is_refused_with_its_value(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LoraConfig(**fields)


@pytest.mark.parametrize(
    ("targets", "message"),
    [(["no_such_layer"], "does not fit"), (["word_embeddings"], "adapts linear layers only")],
)
def test_layers_that_cannot_be_adapted_are_refused(
    tiny_model: Path, targets: list[str], message: str
) -> None:
    config = DualEncoderConfig(encoder=str(tiny_model), lora=LoraConfig(target_modules=targets))
    with pytest.raises(InputError, match=message):
        config.build(NoCompressionConfig())


# --- towers of different sizes ---


@pytest.fixture(scope="module")
def small_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 16 dimensions with the tokenizer of the tiny one, which has 32."""
    folder = tmp_path_factory.mktemp("small") / "model"
    shutil.copytree(tiny_model, folder)
    torch.manual_seed(3)
    config = BertConfig.from_pretrained(tiny_model, hidden_size=16, num_hidden_layers=1)
    BertModel(config).save_pretrained(folder)
    return folder


def two_sizes(small: Path, large: Path, projection: int | None) -> DualEncoder:
    config = DualEncoderConfig(encoder=str(small), document_encoder=str(large), projection=projection)
    return config.build(ProductQuantizerConfig(num_codebooks=4, codebook_bits=4)).eval()


@pytest.mark.parametrize(("dim", "layers"), [(32, (1, 0)), (16, (0, 1)), (8, (1, 1))])
def test_a_tower_of_another_size_gets_a_linear_layer(
    small_model: Path, tiny_model: Path, dim: int, layers: tuple[int, int]
) -> None:
    model = two_sizes(small_model, tiny_model, dim)
    towers = (model.query_encoder, model.document_encoder)
    assert tuple(len(tower.projection) for tower in towers) == layers
    assert {embed(tower, TEXTS).shape[1] for tower in towers} == {dim, model.dim}


def test_towers_of_different_sizes_without_a_projection_are_refused_with_the_remedy(
    small_model: Path, tiny_model: Path
) -> None:
    with pytest.raises(InputError, match=r"got 16 for queries .* Set model\.projection 16 or 32"):
        two_sizes(small_model, tiny_model, None)


@pytest.mark.parametrize("dim", [16, 32])
def test_a_projected_tower_gives_the_same_vectors_in_sentence_transformers(
    small_model: Path, tiny_model: Path, tmp_path: Path, dim: int
) -> None:
    model = two_sizes(small_model, tiny_model, dim)
    model.save(tmp_path / "model")
    for name, tower in (("query", model.query_encoder), ("document", model.document_encoder)):
        theirs = SentenceTransformer(str(tmp_path / "model" / f"{name}_encoder"), device="cpu")
        close(embed(tower, TEXTS), theirs.encode(TEXTS, convert_to_tensor=True), 1e-6)


def test_a_model_folder_gives_back_its_projections(
    small_model: Path, tiny_model: Path, tmp_path: Path
) -> None:
    model = two_sizes(small_model, tiny_model, 8)
    model.save(tmp_path / "model")
    loaded = DualEncoder.load(tmp_path / "model")
    assert torch.equal(embed(loaded.query_encoder, TEXTS), embed(model.query_encoder, TEXTS))
    assert torch.equal(embed(loaded.document_encoder, TEXTS), embed(model.document_encoder, TEXTS))


def test_tied_towers_share_one_projection(tiny_model: Path, tmp_path: Path) -> None:
    model = DualEncoderConfig(encoder=str(tiny_model), projection=8).build(NoCompressionConfig())
    assert model.query_encoder.projection[0] is model.document_encoder.projection[0]
    model.save(tmp_path / "model")
    assert (tmp_path / "model" / "encoder" / "2_Dense" / "config.json").is_file()


def test_a_static_tower_can_be_projected(tmp_path: Path, tiny_model: Path) -> None:
    from retriever import static_encoder

    encoder = static_encoder(Encoder.load(tiny_model)).projected(8).eval()
    encoder.save(tmp_path / "model")
    theirs = SentenceTransformer(str(tmp_path / "model"), device="cpu").encode(TEXTS, convert_to_tensor=True)
    close(embed(encoder, TEXTS), theirs, 1e-6)
    assert torch.equal(embed(Encoder.load(tmp_path / "model"), TEXTS), embed(encoder, TEXTS))


def test_a_new_projection_keeps_lengths_and_angles_as_well_as_one_can(tiny_model: Path) -> None:
    wide = Encoder.load(tiny_model).projected(48).projection[0].weight
    narrow = Encoder.load(tiny_model).projected(8).projection[0].weight
    close(wide.T @ wide, torch.eye(32))
    close(narrow @ narrow.T, torch.eye(8))


def test_modules_in_another_order_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    Encoder.load(tiny_model).projected(8).save(tmp_path / "model")
    path = tmp_path / "model" / "modules.json"
    modules = json.loads(path.read_text())
    path.write_text(json.dumps([*modules[:2], modules[3], modules[2]]))
    with pytest.raises(InputError, match="order Transformer, Pooling, Normalize, Dense"):
        Encoder.load(tmp_path / "model")


# --- memory and speed ---


def gradients(model: DualEncoder, training: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a loss and its gradients by parameter."""
    model.train(training)
    torch.manual_seed(5)
    documents = [Document(str(row), "", text) for row, text in enumerate(TEXTS)]
    queries = model.encode_queries(model.tokenize_queries(TEXTS))
    loss = (queries @ model.encode_documents(model.tokenize_documents(documents)).T).log_softmax(1).trace()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def same_gradients(config: DualEncoderConfig, other: DualEncoderConfig, training: bool, atol: float) -> None:
    results = []
    for each in (config, other):
        torch.manual_seed(0)
        results.append(gradients(each.build(NoCompressionConfig()), training))
    (loss, expected), (other_loss, found) = results
    assert found.keys() == expected.keys()
    assert len(found) > 4
    close(other_loss, loss, atol)
    for name, value in expected.items():
        close(found[name], value, atol)


@pytest.mark.parametrize("training", [True, False], ids=["dropout", "no-dropout"])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2, dropout=0.5)], ids=["weights", "lora"])
def test_recomputed_layers_have_the_same_gradients(
    base: Path, lora: LoraConfig | None, training: bool
) -> None:
    """With adapters no input of a layer needs a gradient, and without dropout the towers are in evaluation mode."""
    config = DualEncoderConfig(encoder=str(base), lora=lora)
    same_gradients(config, replace(config, checkpoint_activations=True), training, 1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_recomputed_layers_keep_less_for_the_way_back(tiny_model: Path, training: bool) -> None:
    kept = []
    for recompute in (False, True):
        encoder = Encoder.load(tiny_model).train(training)
        if recompute:
            recompute_layers(encoder)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda value, sizes=sizes: sizes.append(value.numel()) or value, lambda value: value
        ):
            encoder(encoder.tokenize(TEXTS))
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]


def test_a_static_tower_has_no_layers_to_recompute(tiny_model: Path) -> None:
    from retriever import static_encoder

    with pytest.raises(
        InputError, match=r"model\.checkpoint_activations needs a transformer with layers, got TokenBag"
    ):
        recompute_layers(static_encoder(Encoder.load(tiny_model)))


@pytest.fixture
def eager_compiler(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Take the graphs that torch.compile traces without making machine code of them, which takes long."""
    called: list[bool] = []
    compiled = nn.Module.compile

    def compile_eagerly(module: nn.Module, **options: Any) -> None:
        called.append(True)
        compiled(module, backend="eager", **options)

    monkeypatch.setattr(nn.Module, "compile", compile_eagerly)
    return called


@pytest.mark.filterwarnings("default")  # torch's own compiler warns of what it will change
@pytest.mark.parametrize("more", [{}, {"checkpoint_activations": True}], ids=["plain", "recomputed"])
def test_compiled_towers_have_the_same_gradients_and_names(
    tiny_model: Path, eager_compiler: list[bool], more: dict[str, Any]
) -> None:
    config = DualEncoderConfig(encoder=str(tiny_model))
    same_gradients(config, replace(config, compile=True, **more), False, 1e-5)
    assert eager_compiler
    model = replace(config, compile=True).build(NoCompressionConfig())
    assert model.state_dict().keys() == config.build(NoCompressionConfig()).state_dict().keys()


def test_attention_is_what_was_asked_for(tiny_model: Path) -> None:
    found = {
        name: Encoder.load(tiny_model, attention=name).backbone.config._attn_implementation
        for name in ("eager", "sdpa")
    }
    assert found == {"eager": "eager", "sdpa": "sdpa"}
    assert Encoder.load(tiny_model).backbone.config._attn_implementation == "sdpa"
    close(*(embed(Encoder.load(tiny_model, attention=name), TEXTS) for name in found))


@pytest.mark.parametrize(
    ("attention", "named"),
    [("flash_attention_2", "FlashAttention2"), ("no_such_attention", "no_such_attention")],
)
def test_attention_that_is_not_here_is_refused_at_the_start(
    tiny_model: Path, attention: str, named: str
) -> None:
    with pytest.raises(InputError, match=rf"cannot be loaded: .*{named}"):
        Encoder.load(tiny_model, attention=attention)


def test_weights_that_train_are_not_bfloat16() -> None:
    experiment = partial(
        Experiment,
        output="run",
        head=ProductQuantizerConfig(),
        loss=ContrastiveConfig(),
        data=DataConfig(source="data"),
    )
    model = DualEncoderConfig(encoder="model", dtype="bfloat16")
    with pytest.raises(InputError, match=r"model\.dtype bfloat16 rounds away"):
        experiment(model=model)
    experiment(model=replace(model, lora=LoraConfig()))
    experiment(model=model, optimization=OptimizationConfig(freeze="both", dense_warmup=0))


def test_an_unknown_type_of_weights_is_refused() -> None:
    with pytest.raises(InputError, match=r"model\.dtype must be one of float32, bfloat16, got 'float16'"):
        DualEncoderConfig(encoder="model", dtype="float16")  # type: ignore[arg-type]
