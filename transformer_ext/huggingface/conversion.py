"""What a conversion in either direction is, and where it writes to."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformer_ext.files import FileError, atomic_directory, parameter_shapes
from transformer_ext.model.config import ModelConfig

if TYPE_CHECKING:
    import numpy as np

    from transformer_ext.inference.options import SearchOptions


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        path: the folder written.
        config: architecture of our model.
        messages: what was converted, for a person to read, a line each.
        search: when importing a model of MarianMT, the options that find what ``generate`` finds
            with the model's own ``generation_config.json``, as far as there are such.
    """

    path: Path
    config: ModelConfig
    messages: list[str]
    search: SearchOptions | None = None


@contextlib.contextmanager
def output_folder(path: Path, other: Path, overwrite: bool) -> Iterator[Path]:
    """The folder to write into; see :func:`transformer_ext.files.atomic_directory`.

    Args:
        path: the folder to appear.
        other: what is converted, which must not be replaced.
        overwrite: replace a model that is there.

    Raises:
        FileError: something is in the way.
    """
    empty = path.is_dir() and not any(path.iterdir())
    if path.exists() and not empty:
        if not overwrite:
            raise FileError(f"{path}: is there already, and not empty; --overwrite replaces it")
        if not path.is_dir() or not (path / "config.json").is_file():
            raise FileError(f"{path}: holds no config.json, so no model; nothing was replaced")
        if path.resolve() == other.resolve():
            raise FileError(f"{path}: expected another folder than the one to be converted")
    with atomic_directory(path, overwrite=empty or overwrite) as folder:
        yield folder


def parameters(config: ModelConfig) -> int:
    """Number of weights of a model."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def split_heads(config: ModelConfig, rows: np.ndarray, parts: int) -> list[np.ndarray]:
    """Queries (where there are three parts), keys and values; grouped heads become heads.

    Args:
        config: of the model.
        rows: weight or bias of the joined projections.
        parts: 3, or 2 for keys and values alone.
    """
    import numpy as np

    group = config.num_kv_heads * config.head_dim
    found = np.split(rows, [len(rows) - 2 * group, len(rows) - group])
    repeats = config.nhead // config.num_kv_heads
    for i in (1, 2):
        heads = found[i].reshape(config.num_kv_heads, config.head_dim, *rows.shape[1:])
        found[i] = np.repeat(heads, repeats, axis=0).reshape(-1, *rows.shape[1:])
    return found[-parts:]
