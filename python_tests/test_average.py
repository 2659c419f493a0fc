"""Averaging of weights: the function and ``python -m transformer_ext.average``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from training_helpers import write_text

from transformer_ext import average
from transformer_ext.data.tokenizer import SentencePieceTokenizer, Tokenizer, train_tokenizer
from transformer_ext.files import load_model_dir, parameter_shapes, save_model_dir
from transformer_ext.model import TransformerConfig
from transformer_ext.training.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    lines = [line for path in write_text(folder, 50) for line in path.read_text().splitlines()]
    path = folder / "tokenizer.model"
    path.write_bytes(train_tokenizer(lines, vocab_size=300)[0])
    return SentencePieceTokenizer(path)


def _config(tokenizer: Tokenizer, width: int = 8) -> TransformerConfig:
    size = tokenizer.vocab_size
    return TransformerConfig(
        size,
        size,
        d_model=width,
        nhead=2,
        num_encoder_layers=1,
        num_decoder_layers=1,
        dim_feedforward=8,
    )


def _save(folder: Path, tokenizer: Tokenizer, seed: int, width: int = 8) -> dict[str, np.ndarray]:
    config = _config(tokenizer, width)
    generator = np.random.default_rng(seed)
    weights = {
        name: generator.standard_normal(shape).astype(np.float32)
        for name, shape in parameter_shapes(config).items()
    }
    save_model_dir(folder, config, weights, tokenizer, tokenizer, {"pairs": 7})
    return weights


def test_mean_of_weights(tmp_path: Path, tokenizer: Tokenizer) -> None:
    saved = [_save(tmp_path / str(seed), tokenizer, seed) for seed in range(3)]
    output = average.average_models(
        [tmp_path / "0", tmp_path / "1", tmp_path / "2"], tmp_path / "m"
    )
    model = load_model_dir(output)
    for name, value in model.weights.items():
        assert value.dtype == np.float32
        np.testing.assert_allclose(
            value, np.mean([w[name] for w in saved], axis=0), rtol=1e-6, atol=1e-7
        )
    assert model.training == {"pairs": 7, "averaged": 3}
    assert model.config == _config(tokenizer)


def test_the_newest_checkpoints_of_a_run(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run" / "checkpoints"
    saved = {step: _save(folder / f"step-{step}", tokenizer, step) for step in (5, 10, 100)}
    assert Checkpoints(folder).steps() == [5, 10, 100]
    output = tmp_path / "averaged"
    options = [str(tmp_path / "run"), "--last", "2", "--output", str(output)]
    assert average.main(options) == 0
    assert "average of 2 models" in capsys.readouterr().out
    name = "source_embedding.weight"
    expected = (saved[10][name] + saved[100][name]) / 2
    np.testing.assert_allclose(load_model_dir(output).weights[name], expected, rtol=1e-6)
    assert average.main(options) == 2
    assert "is there already" in capsys.readouterr().err


def test_what_cannot_be_averaged(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    _save(tmp_path / "a", tokenizer, 0)
    _save(tmp_path / "b", tokenizer, 0, width=16)
    with pytest.raises(ValueError, match="architecture differs"):
        average.average_weights([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(ValueError, match="directories"):
        average.average_weights([])
    weights = _save(tmp_path / "c", tokenizer, 1)
    name = "encoder.layers.0.feed_forward_norm.weight"
    weights[name][3] = np.nan
    save_model_dir(tmp_path / "nan", _config(tokenizer), weights, tokenizer, tokenizer)
    wrong = f"{tmp_path / 'nan' / 'model.safetensors'}: {name}: 1 of its 8 numbers are NaN"
    for arguments, message in (
        ([str(tmp_path / "a"), str(tmp_path / "nan")], wrong),
        ([str(tmp_path / "nan"), str(tmp_path / "a")], wrong),
        ([str(tmp_path / "none")], "no model and no checkpoints"),
        ([str(tmp_path / "a"), "--last", "0"], "--last"),
    ):
        assert average.main([*arguments, "--output", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
