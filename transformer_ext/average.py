"""Averages the weights of several checkpoints or models into one model directory.

``python -m transformer_ext.average runs/001 --last 5 --output averaged`` averages the newest
checkpoints of a run; model or checkpoint directories may be named one by one instead. "Attention Is
All You Need", section 6.1, averages the last 5 (base) and the last 20 (big).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from transformer_ext._command import command
from transformer_ext.config import ArgumentParser
from transformer_ext.files import FileError, ModelDir, load_model_dir, save_model_dir
from transformer_ext.model.config import ModelConfig

__all__ = ["average_models", "average_weights", "main"]


def average_weights(directories: Sequence[str | Path]) -> dict[str, np.ndarray]:
    """Mean of the weights of model directories, summed in float64.

    Args:
        directories: One or more model directories of the same architecture.

    Returns:
        float32 weights by name.

    Raises:
        ValueError: No directory, or two whose weights or tokenizers differ in names or shapes.
        FileError: Weights of one hold NaN or an infinity.
    """
    if not directories:
        raise ValueError("directories: got none, expected at least one model directory")
    first = load_model_dir(directories[0], ModelConfig)
    first.weights.check_finite()
    sums = {name: value.astype(np.float64) for name, value in first.weights.items()}
    for directory in directories[1:]:
        other = load_model_dir(directory, ModelConfig)
        if other.config != first.config:
            raise ValueError(
                f"{directory}: its architecture differs from that of {directories[0]}; only "
                "checkpoints of one model can be averaged"
            )
        if _tokenizers(other) != _tokenizers(first):
            raise ValueError(f"{directory}: its tokenizer differs from that of {directories[0]}")
        other.weights.check_finite()
        for name, value in other.weights.items():
            sums[name] += value
    return {name: (value / len(directories)).astype(np.float32) for name, value in sums.items()}


def _tokenizers(model: ModelDir[ModelConfig]) -> tuple[str, str]:
    return model.source_tokenizer.sha256, model.target_tokenizer.sha256


def average_models(directories: Sequence[str | Path], output: str | Path) -> Path:
    """Writes the average of model directories as a model directory; returns it.

    Raises:
        ValueError: As :func:`average_weights`.
        FileError: As there, or ``output`` is there already.
    """
    weights = average_weights(directories)
    first = load_model_dir(directories[0], ModelConfig)
    training = {**first.training, "averaged": len(directories)}
    save_model_dir(
        output, first.config, weights, first.source_tokenizer, first.target_tokenizer, training
    )
    return Path(output)


def _directories(names: Sequence[str], last: int) -> list[Path]:
    """The model directories meant: those named, or the newest checkpoints of a run."""
    from transformer_ext.training.checkpoint import Checkpoints

    run = Path(names[0])
    if len(names) == 1 and not run.is_file() and not (run / "config.json").is_file():
        folder = run / "checkpoints" if (run / "checkpoints").is_dir() else run
        found = Checkpoints(folder).newest(last)
        if not found:
            raise FileError(f"{run}: no model and no checkpoints there")
        return found
    return [Path(name) for name in names]


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = ArgumentParser(
        prog="python -m transformer_ext.average",
        usage="%(prog)s DIR [DIR ...] --output DIR [options]",
        description="Average the weights of checkpoints into one model.",
    )
    parser.add_argument(
        "models",
        metavar="DIR",
        nargs="+",
        help="the directory of a run, or model or checkpoint directories",
    )
    parser.add_argument(
        "--last",
        type=int,
        default=5,
        metavar="N",
        help="of a run: how many of the newest checkpoints (default: %(default)s)",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="model directory to write")
    options: Any = parser.parse_args(arguments)
    if options.last < 1:
        raise ValueError(f"--last: got {options.last}, expected 1 or more")
    directories = _directories(options.models, options.last)
    output = average_models(directories, options.output)
    names = ", ".join(str(d) for d in directories)
    print(f"average of {len(directories)} models ({names}) written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
