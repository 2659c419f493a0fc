"""``python -m transformer_ext.visualize``: each picture, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training_helpers import write_text

from transformer_ext import visualize
from transformer_ext.data.tokenizer import SentencePieceTokenizer, train_tokenizer
from transformer_ext.files import save_model_dir
from transformer_ext.inference.options import SearchOptions
from transformer_ext.inference.search import beam_search
from transformer_ext.model import (
    LanguageModel,
    LanguageModelConfig,
    TextEncoder,
    TextEncoderConfig,
    Transformer,
    TransformerConfig,
)
from transformer_ext.training.optimizer import parameters_by_name
from transformer_ext.training.schedules import Schedule
from transformer_ext.training.translation import TranslationRun
from transformer_ext.visualization import figure

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    lines = [line for path in write_text(folder, 50) for line in path.read_text().splitlines()]
    (folder / "t.model").write_bytes(train_tokenizer(lines, vocab_size=300)[0])
    tokenizer = SentencePieceTokenizer(folder / "t.model")
    torch.manual_seed(0)
    model = Transformer(
        TransformerConfig(
            tokenizer.vocab_size,
            tokenizer.vocab_size,
            d_model=16,
            nhead=2,
            num_encoder_layers=1,
            num_decoder_layers=2,
            dim_feedforward=16,
        )
    )
    weights = {name: p.detach() for name, p in parameters_by_name(model).items()}
    save_model_dir(folder / "model", model.config, weights, tokenizer, tokenizer)
    sizes: Any = {"d_model": 16, "nhead": 2, "num_layers": 2, "dim_feedforward": 16}
    vocab = tokenizer.vocab_size
    for one in (
        LanguageModel(LanguageModelConfig(vocab, **sizes, positions="learned", max_positions=12)),
        TextEncoder(TextEncoderConfig(vocab, **sizes)),
    ):
        weights = {name: p.detach() for name, p in parameters_by_name(one).items()}
        name = "language" if isinstance(one, LanguageModel) else "encoder"
        save_model_dir(folder / name, one.config, weights, tokenizer, tokenizer)
    return folder / "model"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that the command saves; no file is written."""
    figures: list[Any] = []
    monkeypatch.setattr(visualize, "save_figure", lambda figure, output: figures.append(figure))
    return figures


def titles(figure: Any) -> list[str]:
    """Of the panels of maps."""
    return [axes.get_title() or axes.get_title("left") for axes in figure.axes if axes.images]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    try:
        status = visualize.main([str(argument) for argument in arguments])
    except SystemExit as ended:
        status = int(ended.code or 0)
    said = capsys.readouterr()
    return status, said.out, said.err


def test_attention(
    model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    searched: list[Any] = []

    def search(model: Any, sources: Any) -> Any:
        results = beam_search(model, sources, SearchOptions(max_length=4))
        searched.append((sources, results[0].hypotheses[0].tokens))
        return results

    monkeypatch.setattr("transformer_ext.inference.search.beam_search", search)
    output = tmp_path / "picture.png"
    options = ["--source", "cat", "--layer", 1, "--output", output]
    status, out, _ = run(capsys, "attention", model_dir, *options)
    assert status == 0 and output.read_bytes().startswith(PNG)
    ((sources, own),) = searched
    tokenizer = visualize.load_model(model_dir)[1].source_tokenizer
    assert sources == [[*tokenizer.encode("cat"), tokenizer.eos_id]]
    assert out == f"cat\n{tokenizer.decode(own)}\ndrawn into {output}\n"


def test_options_of_attention(
    model_dir: Path, capsys: pytest.CaptureFixture[str], drawn: list[Any]
) -> None:
    pair = ["attention", model_dir, "--source", "cat", "--target", "Katze"]
    encoder = ["attention", model_dir.with_name("encoder"), "--text", "cat sees"]
    language = ["attention", model_dir.with_name("language"), "--text", "cat"]
    for arguments, title, panels in (
        ([*pair, "--layer", 2, "--layer", 1, "--head", 2], "What each piece", "2.2 1.2"),
        ([*pair, "--kind", "encoder"], "Self-attention of the encoder", "1.1 1.2"),
        ([*pair, "--kind", "decoder", "--head", 1], "Self-attention of the decoder", "1.1 2.1"),
        ([*encoder, "--layer", 1], "Self-attention of the text encoder", "1.1 1.2"),
        ([*language, "--head", 2], "Self-attention of the language model", "1.2 2.2"),
    ):
        status, out, _ = run(capsys, *arguments)
        assert status == 0 and ("cat\nKatze\n" in out) == (arguments[0:2] == pair[0:2])
        figure = drawn.pop()
        assert figure.get_suptitle().startswith(title)
        wanted = [each.split(".") for each in panels.split()]
        assert titles(figure) == [f"layer {layer}, head {head}" for layer, head in wanted]


def test_attention_as_a_page(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "page.html"
    options = ["--source", "cat sees dog", "--target", "Katze", "--output", output]
    assert run(capsys, "attention", model_dir, *options)[0] == 0
    text = output.read_text(encoding="utf-8")
    assert '"texts": ["cat sees dog", "Katze"]' in text
    assert text.count('"weights": "') == 3 and '["\\u003c/s>", true]' in text
    assert '["\\u003cs>", true]' in text and '["\u2581", false]' in text


def test_beam(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "beam.svg"
    options = ["--source", "cat", "--beam-size", 2, "--max-length", 4, "--output", output]
    status, out, _ = run(capsys, "beam", model_dir, *options)
    assert status == 0 and b"<svg" in output.read_bytes()
    assert len(out.splitlines()) == 3
    options = ["--source", "cat", "--sampling", "--output", tmp_path / "none.png"]
    status, _, err = run(capsys, "beam", model_dir, *options)
    assert status == 2 and "error: --sampling:" in err
    assert not (tmp_path / "none.png").exists()


def test_beam_of_a_language_model(
    model_dir: Path, capsys: pytest.CaptureFixture[str], drawn: list[Any]
) -> None:
    options = ["--text", "cat sees", "--beam-size", 2, "--num-hypotheses", 2, "--max-length", 3]
    status, out, _ = run(capsys, "beam", model_dir.with_name("language"), *options)
    lines = out.splitlines()
    assert status == 0 and lines[0] == "cat sees" and len(lines) == 4
    assert all(re.match(r"-\d+\.\d{4}  cat sees", line) for line in lines[1:3])
    assert drawn[0].axes[0].texts[0].get_text() == "cat sees"


def test_a_training_ends_without_a_picture_that_is_too_large(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figure, "_MOST_INCHES", 2.0)
    model, saved = visualize.load_model(model_dir)
    said: list[str] = []
    run: Any = SimpleNamespace(
        model=model, prepared=saved, console=SimpleNamespace(print=said.append)
    )
    TranslationRun._draw_attention(run, "cat sees dog", "Katze", tmp_path / "attention.png")
    assert re.match(r"attention.png is not drawn: picture: would be \d+ x \d+ inches", said[0])
    assert not list(tmp_path.iterdir())


def test_flow(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "flow", model_dir, "--output", tmp_path / "flow.png")
    assert status == 0 and (tmp_path / "flow.png").read_bytes().startswith(PNG)
    assert "decoder.layers.0.cross_attention.query_projection  (x 2)" in out
    options = ["--preset", "tiny", "--vocab-size", 50, "--output", tmp_path / "tiny.png"]
    status, out, _ = run(capsys, "flow", *options)
    assert status == 0 and "weight [50, 128] float32" in out


@pytest.mark.parametrize("name", ["language", "encoder"])
def test_flow_of_one_stack(
    model_dir: Path, capsys: pytest.CaptureFixture[str], drawn: list[Any], name: str
) -> None:
    status, out, _ = run(capsys, "flow", model_dir.with_name(name))
    head = {"language": "LanguageModel: ", "encoder": "TextEncoder: "}[name]
    assert status == 0 and out.startswith(head)
    assert any(text.get_text().startswith(head[:-2]) for text in drawn[0].axes[0].texts)


def test_options_of_pictures_without_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], drawn: list[Any]
) -> None:
    def figure(*arguments: object) -> Any:
        assert run(capsys, *arguments, "--output", tmp_path / "x.png")[0] == 0
        return drawn.pop()

    steps = ["--learning-rate", 0.5, "--warmup-steps", 20, "--max-steps", 90]
    curves = figure("schedules", *steps, "--final-fraction", 0.25).axes[1].get_lines()
    for curve in curves:
        schedule = Schedule(curve.get_label(), 0.5, 20, 90, 0.25)
        assert list(curve.get_ydata()[[0, -1]]) == [schedule(1), schedule(90)]
    noam = figure("schedules", *steps).axes[0].get_lines()
    assert len(curves) == 4 and [line.get_xdata()[-1] for line in noam] == [90] * 3
    for layout in ("sinusoidal", "sinusoidal_halves"):
        (title,) = titles(figure("positions", "--d-model", 8, "--length", 3, "--layout", layout))
        assert title.startswith(f"{layout}:")
    both = figure("positions", "--d-model", 8, "--length", 3)
    assert [axes.images[0].get_array().shape for axes in both.axes if axes.images] == [(3, 8)] * 2
    left, right = figure("label-smoothing", "--label-smoothing", 0.2, "--vocab-size", 4).axes[:2]
    assert [text.get_text() for text in left.texts[:4]] == ["0.05", "0.05", "0.85", "0.05"]
    assert [line.get_label().split()[-1] for line in right.get_lines()] == [
        "0",
        "0.1",
        "0.2",
        "0.3",
    ]


def test_pictures_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"event": "train", "step": 1, "nll": 2.0}\n')
    for name, options in (
        ("positions", ["--d-model", 64]),
        ("schedules", ["--max-steps", 500, "--warmup-steps", 50]),
        ("label-smoothing", ["--label-smoothing", 0.2]),
        ("training", [tmp_path]),
        ("training", [log]),
    ):
        output = tmp_path / f"{name}.png"
        assert run(capsys, name, *options, "--output", output)[0] == 0
        assert output.read_bytes().startswith(PNG)
        output.unlink()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: PICTURE"),
        ("atention", "PICTURE: expected one of attention, beam, .*; did you mean 'attention'"),
        ("attention", "the following arguments are required: MODEL_DIR"),
        ("attention {model}", "--source: is missing; .* is encoder-decoder"),
        ("attention {model} --text x", "--text: .* is encoder-decoder; expected --source"),
        ("attention {model} --source x --layer 9", "--layer: got 9, expected 1 to 2"),
        (
            "attention {model} --source x --kind encoder --layer 2",
            "--layer: got 2, expected 1 to 1",
        ),
        ("attention {model} --source x --head 0", "--head: got 0, expected 1 to 2"),
        ("attention {model} --source=", "--source: got '', expected a text of at least one letter"),
        ("attention {model} --source x --target=", "--target: got '', expected a text"),
        ("attention {model} --source x --output {tmp}/empty/log.jsonl/x.png", "is no folder"),
        ("attention {model} --source x --output {long}", "output: .* cannot be written: File name"),
        (
            f"attention {{model}}/../language --text {'q' * 40}",
            "--text: has \\d+ tokens with those around it, expected at most 12: the model has no",
        ),
        (
            f"attention {{model}} --source x --target {'q' * 3000}",
            "--target: has 3,.* at most 2,000",
        ),
        ("beam {model} --source=", "--source: got '', expected a text"),
        ("beam {model}", "--source: is missing; .* is encoder-decoder"),
        ("beam {model} --text x", "--text: .* is encoder-decoder; expected --source"),
        ("attention {model} --source a\udcffb", r"--source: got 'a\\udcffb', expected UTF-8"),
        ("attention {model} --source x --target \udcff", "--target: got .*, expected UTF-8"),
        ("attention {nothing} --source x", "error: '': no such model directory"),
        ("beam {model} --source x --beam-size 33", "--beam-size: got 33, expected at most 32"),
        (
            "beam {model} --source x --beam-size 32 --max-length 40",
            "leaves.*a shorter text, or a smaller --beam-size or --max-length",
        ),
        ("positions --d-model 9000", "--d-model: got 9000, expected at most 8192"),
        ("positions --layout halves", "--layout: invalid choice: 'halves'"),
        ("attention {model} --source x --output x.jpg", "output: expected a file in .png, .*x.jpg"),
        ("attention {model} --source x --output x.html --kind cross", "--kind: a page has all"),
        ("attention {tmp} --source x", "config.json"),
        ("beam {model} --source x --output x.html", "output: expected a file in .png, .svg, .pdf"),
        ("beam {model} --source x --beam-sise 2", "did you mean '--beam-size'"),
        ("flow", "model: expected either MODEL_DIR or --preset"),
        ("flow {model} --vocab-size 5", "--vocab-size: a model has its own"),
        ("positions --length 0", "--length: got 0, expected at least 1"),
        ("positions --d-model 3", "--d-model: got 3, expected an even number"),
        ("schedules --warmup-steps 9 --max-steps 9", "--warmup-steps: got 9, expected fewer than"),
        ("schedules --max-steps 0", "--max-steps: got 0, expected 1 or more"),
        ("label-smoothing --vocab-size 1", "--vocab-size: got 1, expected 2 to 256000"),
        ("training {tmp}", "expected the folder of a training, or its log.jsonl"),
        ("training {empty}", "log.jsonl: has no step and no validation yet"),
        (
            "training {config}",
            "config.json: is not the log of a training: line 1 is no JSON object",
        ),
    ],
)
def test_what_is_refused(
    arguments: str,
    message: str,
    model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "log.jsonl").write_text('{"event": "start"}\n')
    places = {
        "nothing": "",
        "config": model_dir / "config.json",
        "model": model_dir,
        "tmp": tmp_path,
        "empty": tmp_path / "empty",
    }
    places["long"] = tmp_path / f"{'x' * 240}.png"
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, *(word.format(**places) for word in arguments.split()))
    assert status == 2 and re.search(message, err), err
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
