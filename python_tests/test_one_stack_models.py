"""The models of one stack, language model and classifier: against torch.nn.TransformerEncoder, their
own layouts, and their model directories."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from kernel_testing import needs_compiled, threads
from torch import Tensor, nn
from torch.nn import functional

from transformer_ext import average, ops, score, translate
from transformer_ext.data.tokenizer import SentencePieceTokenizer, Tokenizer, train_tokenizer
from transformer_ext.files import FileError, load_model_dir, parameter_shapes, save_model_dir
from transformer_ext.model import (
    LanguageModel,
    LanguageModelConfig,
    Model,
    ModelConfig,
    TextEncoder,
    TextEncoderConfig,
    TransformerConfig,
    classifier_preset,
    language_model_preset,
)
from transformer_ext.ops.linear import gemm_choices
from transformer_ext.packed import Packed

SMALL: dict[str, Any] = {
    "vocab_size": 37,
    "d_model": 24,
    "nhead": 3,
    "num_layers": 2,
    "dim_feedforward": 40,
}
GPT2 = {
    "norm_first": True,
    "positions": "learned",
    "max_positions": 64,
    "activation": "gelu_tanh",
    "scale_embedding": False,
}
BERT = {
    "positions": "learned",
    "max_positions": 64,
    "activation": "gelu",
    "embedding_norm": True,
    "scale_embedding": False,
    "layer_norm_eps": 1e-12,
    "pooler": True,
    "num_token_types": 2,
    "output_bias": True,
}
SHARED = {
    "paper": {},
    "pre_norm": {"norm_first": True},
    "rms_rope_swiglu": {
        "norm": "rms",
        "norm_first": True,
        "positions": "rope",
        "activation": "swiglu",
        "bias": False,
    },
    "grouped_heads": {"nhead": 6, "num_kv_heads": 2, "head_dim": 5, "output_bias": True},
    "no_layers": {"num_layers": 0, "positions": "none", "final_norm": True},
}
LANGUAGE_MODELS = {**SHARED, "gpt2": GPT2, "untied": {"tie": False}}
CLASSIFIERS = {
    **SHARED,
    "bert": BERT,
    "mean": {"pooling": "mean"},
    "heads": {**BERT, "pooling": "mean", "normalize": True, "masked_lm_head": True},
}
BOTH = [("language", name) for name in LANGUAGE_MODELS] + [("labels", name) for name in CLASSIFIERS]


def build(kind: str, name: str = "", **changes: Any) -> Any:
    torch.manual_seed(3)
    model: Model
    if kind == "language":
        fields = {**SMALL, **LANGUAGE_MODELS.get(name, {}), **changes}
        model = LanguageModel(LanguageModelConfig(**fields))
    else:
        fields = {**SMALL, "labels": ["a", "b", "c"], **CLASSIFIERS.get(name, {}), **changes}
        model = TextEncoder(TextEncoderConfig(**fields))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def some_ids(lengths: list[int], seed: int = 0, vocabulary: int = 37) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(4, vocabulary, (length,), generator=generator)
    return ids


def copy_stack(stack: Any, theirs: nn.TransformerEncoder) -> None:
    """Weights of torch's encoder into ours."""
    pairs = []
    for mine, other in zip(stack.layers, theirs.layers, strict=True):
        attention = other.self_attn
        pairs += [
            (mine.self_attention.in_projection.weight, attention.in_proj_weight),
            (mine.self_attention.in_projection.bias, attention.in_proj_bias),
            (mine.self_attention.out_projection.weight, attention.out_proj.weight),
            (mine.self_attention.out_projection.bias, attention.out_proj.bias),
        ]
        for ours, name in (
            (mine.self_attention_norm, "norm1"),
            (mine.feed_forward_norm, "norm2"),
            (mine.feed_forward.in_projection, "linear1"),
            (mine.feed_forward.out_projection, "linear2"),
        ):
            module = getattr(other, name)
            pairs += [(ours.weight, module.weight), (ours.bias, module.bias)]
    if theirs.norm is not None:
        pairs += [(stack.norm.weight, theirs.norm.weight), (stack.norm.bias, theirs.norm.bias)]
    with torch.no_grad():
        for mine, other in pairs:
            mine.copy_(other)


@pytest.mark.parametrize("kind", ["language", "labels"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_equals_nn_transformer_encoder(kind: str, norm_first: bool) -> None:
    """States and gradients against torch's modules, which compute in float32 and in float64."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        24, 3, 40, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first
    )
    final = nn.LayerNorm(24) if norm_first else None
    theirs = nn.TransformerEncoder(layer, 2, final, enable_nested_tensor=False)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = build(
        kind,
        dropout=0.0,
        activation="gelu",
        norm_first=norm_first,
        positions="learned",
        max_positions=16,
    )
    stack = model.decoder if kind == "language" else model.encoder
    copy_stack(stack, theirs)
    lengths = [7, 3, 5]
    ids = some_ids(lengths)
    real = torch.arange(7) < torch.tensor(lengths)[:, None]

    def run_theirs(dtype: torch.dtype) -> list[Tensor]:
        module = theirs.to(dtype)
        module.zero_grad()
        embedding = model.embedding.weight.detach().to(dtype).requires_grad_()
        positions = stack.positions.weight.detach().to(dtype)
        x = embedding[ids] * 24**0.5 + positions[:7]
        mask = nn.Transformer.generate_square_subsequent_mask(7).isinf()
        out = module(x, mask=mask if kind == "language" else None, src_key_padding_mask=~real)
        states = out[real] if kind == "language" else out[:, 0]
        states.square().sum().backward()
        assert embedding.grad is not None and layer.linear1.weight is not None
        return [states, embedding.grad, module.layers[0].linear1.weight.grad.clone()]

    theirs32, theirs64 = run_theirs(torch.float32), run_theirs(torch.float64)
    # Tied, the embedding's gradient would be the same here: the generator is not used.
    states = model(ids)
    states = states[real] if kind == "language" else states
    states.square().sum().backward()
    ours = [
        states,
        model.embedding.weight.grad,
        stack.layers[0].feed_forward.in_projection.weight.grad,
    ]
    for mine, their32, their64 in zip(ours, theirs32, theirs64, strict=True):
        bound = 2 * (their32.double() - their64).abs().max() + 1e-6
        assert (mine.double() - their64).abs().max() <= bound
    exact = model.double()(ids)
    exact = exact[real] if kind == "language" else exact
    torch.testing.assert_close(exact, theirs64[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("kind", "name"), BOTH)
def test_a_sequence_does_not_see_its_neighbours_nor_padding(kind: str, name: str) -> None:
    model = build(kind, name).eval()
    ids = some_ids([6, 4, 9])
    together = model(ids)
    for row, length in enumerate([6, 4, 9]):
        alone = model(ids[row : row + 1, :length])
        expected = together[row : row + 1, :length] if kind == "language" else together[row][None]
        torch.testing.assert_close(expected, alone, rtol=1e-5, atol=1e-6)
    # What stands in the padding is not read where the lengths say that it is padding.
    other = ids.clone()
    other[ids == 0] = 7
    torch.testing.assert_close(model(other, torch.tensor([6, 4, 9])), together, rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "name"), BOTH)
def test_slack_rows_have_no_effect(kind: str, name: str) -> None:
    """Rows past the last sequence change no result and no gradient, with dropout on."""
    model = build(kind, name).train()
    ids = some_ids([6, 2])
    states, gradients = [], []
    for slack in (0, 3):
        model.zero_grad()
        model.seed_dropout(5)
        sequences = Packed.from_lengths([6, 2], 8 + slack)
        hidden = model.forward_packed(sequences.pack(ids), sequences)
        hidden = hidden[:8]
        hidden.square().sum().backward()
        states.append(hidden)
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "name"), BOTH)
def test_compiled_follows_reference(kind: str, name: str) -> None:
    """With dropout on: the masks are the same, so the compiled ops must follow their twins."""
    results = []
    ids = some_ids([6, 2, 9])
    for chosen in ("auto", "reference"):
        model = build(kind, name).train()
        model.seed_dropout(11)
        with ops.set_backend(chosen):
            out = model.logits(ids)
            out.square().mean().backward()
        results.append((out, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-3, atol=1e-4)
    for ours, reference in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_later_token_changes_nothing_before(name: str) -> None:
    model = build("language", name).eval()
    ids = some_ids([9])
    before = model(ids)
    for place in range(1, 9):
        other = ids.clone()
        other[0, place] = 36 if ids[0, place] != 36 else 35
        after = model(other)
        torch.testing.assert_close(after[0, :place], before[0, :place], rtol=1e-5, atol=1e-6)
        assert not torch.equal(after[0, place], before[0, place])


def test_step_by_step_equals_teacher_forcing() -> None:
    model = build("language", "rms_rope_swiglu").eval()
    ids = some_ids([5, 5])
    whole = torch.log_softmax(model.logits(ids), -1)
    for length in (1, 3, 5):
        step = model.next_log_probs(ids[:, :length])
        torch.testing.assert_close(step, whole[:, length - 1], rtol=1e-4, atol=1e-5)


def test_pooling_is_what_it_is_called() -> None:
    ids = some_ids([6, 2, 9])
    sequences = Packed.from_lengths([6, 2, 9])
    slack = Packed.from_lengths([6, 2, 9], 20)
    for pooling in ("first", "mean"):
        model = build("labels", pooling=pooling).eval()
        states = model.encode_packed(sequences.pack(ids), sequences).split([6, 2, 9])
        expected = torch.stack([s[0] if pooling == "first" else s.mean(0) for s in states])
        torch.testing.assert_close(model(ids), expected, rtol=1e-5, atol=1e-6)
        hidden = torch.full((20, model.config.d_model), torch.nan)
        hidden[:17] = torch.cat(states)
        hidden.requires_grad_()
        pooled = model._pool(hidden, slack)
        torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-6)
        (grad,) = torch.autograd.grad(pooled.sum(), hidden)
        share = [[1 / n] * n if pooling == "mean" else [1.0] + [0.0] * (n - 1) for n in (6, 2, 9)]
        torch.testing.assert_close(grad[:, 0], torch.tensor([*sum(share, []), 0.0, 0.0, 0.0]))


def test_a_model_in_training_takes_no_state_for_no_dropout() -> None:
    model = build("labels", dropout=0.5).eval()
    sequences = Packed.from_lengths([5])
    ids = torch.arange(4, 9)
    expected = model.encode_packed(ids, sequences)
    model.train()
    assert torch.equal(model.encode_packed(ids, sequences), expected)
    assert not torch.equal(model.encode_packed(ids, sequences, rng=model.rng), expected)


def test_bert_parts() -> None:
    """Token types are added before the norm; the pooler is a projection and tanh."""
    model = build("labels", "bert").eval()
    ids = some_ids([6, 4])
    types = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]])
    torch.testing.assert_close(model(ids), model(ids, token_types=torch.zeros_like(types)))
    out = model(ids, token_types=types)
    assert not torch.allclose(out, model(ids), atol=1e-3)
    with torch.no_grad():
        # A type's row added to the positions by hand.
        moved = build("labels", "bert").eval()
        moved.encoder.token_types.weight.zero_()
        weight = model.encoder.token_types.weight
        moved.encoder.positions.weight[:6] += weight[types[0]]
        torch.testing.assert_close(moved(ids[:1]), out[:1], rtol=1e-5, atol=1e-6)
        plain = build("labels", "bert", pooler=False).eval()
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if "pooler" not in k})
        states = plain(ids, token_types=types)
        pooled = torch.tanh(states @ model.pooler.weight.T + model.pooler.bias)
        torch.testing.assert_close(out, pooled, rtol=1e-5, atol=1e-6)


def test_heads_of_a_text_encoder() -> None:
    model = build("labels", "heads").eval()
    ids = some_ids([6, 4])
    sequences = Packed.from_lengths([6, 4])
    torch.testing.assert_close(model(ids).norm(dim=-1), torch.ones(2))
    plain = build("labels", "heads", normalize=False).eval()
    torch.testing.assert_close(functional.normalize(plain(ids)), model(ids))
    states = model.encode_packed(sequences.pack(ids), sequences)[[1, 7]]
    head = model.masked_lm_head
    inner = functional.gelu(states @ head.projection.weight.T + head.projection.bias)
    inner = functional.layer_norm(inner, (24,), head.norm.weight, head.norm.bias, 1e-12)
    expected = inner @ model.embedding.weight.T + head.bias
    torch.testing.assert_close(model.masked_logits(states), expected, rtol=1e-5, atol=1e-6)
    without = build("labels", "bert", labels=[])
    assert without.generator is None and without(ids).shape == (2, 24)


@needs_compiled
@pytest.mark.parametrize("kind", ["language", "labels"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_loss_and_gradients_are_the_same_bits_for_any_number_of_threads(
    kind: str, precision: str
) -> None:
    libraries = {c["library"] for c in gemm_choices() if c["dtype"] == precision}
    if libraries != {"transformer_ext"}:
        pytest.skip(f"on this machine torch multiplies {precision}")
    ids = some_ids([60, 20, 95] * 4, vocabulary=370)
    sizes = {"vocab_size": 370, "d_model": 96, "dim_feedforward": 200}
    results = []
    for count in (1, 2, 4):
        with threads(count):
            model = build(kind, "mean", **sizes).set_precision(precision)
            model.seed_dropout(5)
            hidden = model(ids)
            labels = ids.flatten() if kind == "language" else torch.arange(12) % 3
            hidden = hidden.flatten(0, -2)
            loss = ops.linear_cross_entropy(hidden, model.generator.weight, labels).loss
            loss.backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            results.append([loss, *gradients])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("kind", "name"), [("language", "gpt2"), ("labels", "bert")])
def test_compiles_whole(kind: str, name: str) -> None:
    ids = some_ids([6, 2, 9])
    gradients = []
    for compile_it in (False, True):
        model = build(kind, name, dropout=0.0).train()
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compile_it else model
        run(ids).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["language", "labels"])
def test_every_dropout_site_is_its_own(kind: str) -> None:
    model = build(kind)
    sites = [m.site for m in model.modules() if hasattr(m, "site")]
    sites += [s for m in model.modules() if hasattr(m, "sites") for s in m.sites]
    stack = model.decoder if kind == "language" else model.encoder
    sites += [stack.embedding_site] + ([model.pooled_site] if kind == "labels" else [])
    assert len(sites) == len(set(sites)) == 1 + 2 * 4 + (kind == "labels")
    model.train()
    ids = some_ids([6])
    assert not torch.equal(model(ids), model(ids))


@pytest.mark.parametrize(("kind", "name"), BOTH)
def test_parameter_names_are_the_models(kind: str, name: str) -> None:
    model = build(kind, name)
    found = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert parameter_shapes(model.config) == found
    assert type(model.config).from_dict(model.config.to_dict()) == model.config


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("language", {"vocab_size": 0}, "vocab_size: expected an integer of at least 1"),
        ("language", {"tie": "all"}, "tie: expected true or false, got 'all'"),
        ("language", {"eos_id": 37}, "eos_id: expected an integer from 0 to 36, got 37"),
        ("language", {"norm": "batch"}, "norm: expected one of layer, rms"),
        ("labels", {"masked_lm_head": 1}, "masked_lm_head: expected true or false, got 1"),
        (
            "labels",
            {"masked_lm_head": True, "activation": "geglu"},
            "activation: 'geglu' is gated, which the masked_lm_head cannot be",
        ),
        ("labels", {"labels": "ab"}, "labels: expected a list of texts"),
        ("labels", {"labels": ["a", "a"]}, "labels: expected each once"),
        ("labels", {"pooling": "last"}, "pooling: expected one of first, mean, got 'last'"),
        ("labels", {"num_token_types": -1}, "num_token_types: expected an integer"),
    ],
)
def test_wrong_configurations_are_named(kind: str, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(kind, **changes)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="unknown key 'src_vocab_size'; did you mean 'vocab_size'"):
        LanguageModel(src_vocab_size=10)
    with pytest.raises(ValueError, match="vocab_size is missing"):
        TextEncoder(labels=["a"])
    with pytest.raises(ValueError, match="labels: the model has none"):
        build("labels", labels=[]).logits(some_ids([3]))
    with pytest.raises(ValueError, match="masked_lm_head: the model has none"):
        build("labels").masked_logits(torch.zeros(1, 24))
    with pytest.raises(TypeError, match="config: expected a LanguageModelConfig, got Transformer"):
        LanguageModel(TransformerConfig(10, 10))  # type: ignore[arg-type]
    language, labels = build("language", "gpt2"), build("labels")
    with pytest.raises(ValueError, match="ids: expected int64"):
        language(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="ids: padding .* stands before a token"):
        language(torch.tensor([[0, 5]]))
    with pytest.raises(ValueError, match=r"lengths: expected integers \[1\]"):
        language(torch.tensor([[4, 5]]), torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="lengths: got 3, but ids has 2 columns"):
        language(torch.tensor([[4, 5]]), torch.tensor([3]))
    with pytest.raises(ValueError, match="longer than the 64 learned positions"):
        language(torch.full((1, 65), 5))
    with pytest.raises(ValueError, match="token_types: expected none"):
        labels(some_ids([3]), token_types=some_ids([3]))
    with pytest.raises(ValueError, match="^ids: got 1005, expected ids from 0 to"):
        language(torch.tensor([[4, 1005]]))


def test_presets() -> None:
    language = language_model_preset("small", 100, positions="rope")
    assert (language.d_model, language.num_layers, language.positions) == (256, 3, "rope")
    labels = classifier_preset("base", 100, ["x", "y"])
    assert (labels.d_model, labels.num_layers, labels.labels) == (512, 6, ["x", "y"])
    with pytest.raises(ValueError, match="preset: expected one of .*did you mean 'tiny'"):
        language_model_preset("tinny", 100)


# --- model directories ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(["to be or not to be"] * 9, vocab_size=280)[0])
    return SentencePieceTokenizer(path)


def save(kind: str, folder: Any, tokenizer: Tokenizer, **changes: Any) -> Any:
    model = build(kind, vocab_size=tokenizer.vocab_size, **changes)
    save_model_dir(folder, model.config, model.state_dict(), tokenizer, tokenizer, {"note": 1})
    return model


@pytest.mark.parametrize(("kind", "name"), [("language", "gpt2"), ("labels", "bert")])
def test_model_directory_round_trip(kind: str, name: str, tmp_path, tokenizer) -> None:
    model = save(kind, tmp_path / "m", tokenizer, name=name)
    values = json.loads((tmp_path / "m" / "config.json").read_text())
    assert values["format_version"] == 2 and values["kind"] == model.config.kind
    loaded = load_model_dir(tmp_path / "m", type(model.config))
    assert loaded.config == model.config and loaded.training == {"note": 1}
    assert loaded.source_tokenizer is loaded.target_tokenizer
    for parameter_name, value in model.named_parameters():
        np.testing.assert_array_equal(loaded.weights[parameter_name], value.detach().numpy())
    assert load_model_dir(tmp_path / "m", ModelConfig).config == model.config


def test_other_kinds_are_refused_by_name(tmp_path, tokenizer, capsys) -> None:
    save("language", tmp_path / "m", tokenizer)
    message = (
        f"{tmp_path / 'm'}: is a decoder-only (language) model, expected an encoder-decoder "
        "(translation) model"
    )
    with pytest.raises(FileError) as caught:
        load_model_dir(tmp_path / "m")
    assert str(caught.value) == message
    text = tmp_path / "text"
    text.write_text("to be\n")
    model = str(tmp_path / "m")
    for command, arguments in (
        (translate, [model, str(text)]),
        (score, [model, "--src", str(text), "--tgt", str(text)]),
    ):
        try:
            status = command.main(arguments)
        except SystemExit as exit:
            status = exit.code
        error = capsys.readouterr().err
        assert status == 2 and message in error, command.__name__
    with pytest.raises(FileError, match="expected an encoder-only"):
        load_model_dir(tmp_path / "m", TextEncoderConfig)


def test_average_takes_every_kind(tmp_path, tokenizer) -> None:
    model = save("labels", tmp_path / "one", tokenizer)
    with torch.no_grad():
        model.generator.weight.add_(2.0)
    save_model_dir(tmp_path / "two", model.config, model.state_dict(), tokenizer, tokenizer)
    average.average_models([tmp_path / "one", tmp_path / "two"], tmp_path / "mean")
    mean = load_model_dir(tmp_path / "mean", TextEncoderConfig)
    np.testing.assert_allclose(
        mean.weights["generator.weight"],
        model.generator.weight.detach() - 1.0,
        rtol=1e-6,
        atol=1e-6,
    )
