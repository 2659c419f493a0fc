"""The figures of ``log.jsonl`` for TensorBoard as well."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

__all__ = ["Board"]


class Board:
    """Writes scalars of training and validation into a folder that ``tensorboard --logdir`` reads.

    Args:
        folder: Where to.
        after_step: What TensorBoard has of later steps is hidden: they are trained again.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, after_step: int = 0) -> None:
        self.require()
        from torch.utils.tensorboard import SummaryWriter

        purge = after_step + 1 if after_step else None
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge)

    @staticmethod
    def require() -> None:
        """Looks whether TensorBoard is there, without the seconds that importing it takes.

        Raises:
            ImportError: It is not.
        """
        if importlib.util.find_spec("tensorboard") is None:
            raise ImportError(
                "--tensorboard: needs the package tensorboard, which is not installed (pip install "
                "tensorboard)"
            )

    def write(self, event: str, values: dict[str, Any]) -> None:
        """Takes the numbers of one event of the log, under ``train/`` or ``validation/``."""
        if event not in ("train", "validation"):
            return
        step = values["step"]
        for name, value in values.items():
            if type(value) in (int, float) and name != "step" and math.isfinite(value):
                self._writer.add_scalar(f"{event}/{name}", value, step)
        self._writer.flush()

    def close(self) -> None:
        """Closes the files."""
        self._writer.close()
