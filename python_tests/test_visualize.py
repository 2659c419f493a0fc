"""Pictures of attention: the functions and ``python -m transformer_ext.visualize``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from training_helpers import write_text

from transformer_ext import visualize
from transformer_ext.data.tokenizer import SentencePieceTokenizer, train_tokenizer
from transformer_ext.files import save_model_dir
from transformer_ext.model import Transformer, TransformerConfig
from transformer_ext.training.optimizer import parameters_by_name

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
    return folder / "model"


def test_one_panel_for_each_layer_and_head(tmp_path: Path) -> None:
    weights = [np.full((3, 2, 4), 0.25), np.full((2, 2, 4), 0.25)]
    figure = visualize.draw_attention(weights, ["a", "b"], ["\u2581c", "d", "e", "f"], title="T")
    drawn = [axes for axes in figure.axes if axes.images]
    assert len(drawn) == 5
    assert drawn[0].get_title() == "layer 1, head 1"
    assert [label.get_text() for label in drawn[0].get_yticklabels()] == ["a", "b"]
    last = drawn[3].get_xticklabels()
    assert [label.get_text() for label in last] == ["_c", "d", "e", "f"]
    figure.savefig(tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(PNG)


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match="weights"):
        visualize.draw_attention([], ["a"], ["b"])
    with pytest.raises(ValueError, match=r"expected \(heads, 1, 2\)"):
        visualize.draw_attention([np.zeros((1, 3, 2))], ["a"], ["b", "c"])


@pytest.mark.parametrize("kind", list(visualize.KINDS))
def test_the_command_draws(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    output = tmp_path / "picture.png"
    options = [str(model_dir), "--source", "cat sees dog", "--kind", kind, "--output", str(output)]
    target = [] if kind == "cross" else ["--target", "Katze sieht Hund", "--layer", "1"]
    assert visualize.main([*options, *target]) == 0
    assert output.read_bytes().startswith(PNG)
    said = capsys.readouterr().out
    assert "cat sees dog" in said and str(output) in said


def test_the_command_refuses(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = ["--output", str(tmp_path / "x.png")]
    assert visualize.main([str(tmp_path), "--source", "x", *picture]) == 2
    assert "config.json" in capsys.readouterr().err
    options = [str(model_dir), "--source", "x", "--target", "x", "--layer", "9", *picture]
    assert visualize.main(options) == 2
    assert "layer: got 9, expected 1 to 2" in capsys.readouterr().err
