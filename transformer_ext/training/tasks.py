"""The tasks by name; each is imported when it is asked for."""

from __future__ import annotations

import importlib
from typing import Protocol, cast

from transformer_ext.config import TrainConfig
from transformer_ext.training.machine import Machine
from transformer_ext.training.report import Console
from transformer_ext.training.run import Run

__all__ = ["Task", "task_of"]

_TASKS = {
    "translate": ("translation", "TranslationRun"),
    "copy": ("synthetic", "SyntheticRun"),
    "sort": ("synthetic", "SyntheticRun"),
    "reverse": ("synthetic", "SyntheticRun"),
    "language-model": ("language_model", "LanguageModelRun"),
    "classify": ("classification", "ClassificationRun"),
}


class Task(Protocol):
    """A class of runs."""

    def preferences(self, config: TrainConfig) -> TrainConfig:
        """The configuration with what suits the task in place of what the machine would choose."""

    def check_metric(self, config: TrainConfig) -> None:
        """Whether the task can have the metric that the configuration asks for.

        Raises:
            ConfigError: It cannot, whatever the data are.
        """

    def prepare(self, config: TrainConfig, machine: Machine, console: Console) -> Run:
        """Reads the data, or finds them prepared.

        Raises:
            ValueError: They cannot be used.
        """


def task_of(config: TrainConfig) -> Task:
    """The class for the task of a configuration."""
    module, name = _TASKS[config.task]
    found = getattr(importlib.import_module(f"transformer_ext.training.{module}"), name)
    return cast(Task, found)
