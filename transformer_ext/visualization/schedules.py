"""Learning rate schedules: the rate of each optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from transformer_ext.training.schedules import SCHEDULES, Schedule
from transformer_ext.visualization.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_schedules", "every_schedule", "noam_schedules", "schedule_curve"]


def schedule_curve(
    schedule: Schedule, points: int = 1000
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Steps from 1 to the last, at most so many of them, and the learning rate at each."""
    last = schedule.total_steps
    steps = np.unique(np.linspace(1, last, min(points, last)).round().astype(np.int64))
    # The peak is a corner that evenly spread steps would cut off.
    steps = np.union1d(steps, np.clip([schedule.warmup_steps], 1, last))
    return steps, np.array([schedule(int(step)) for step in steps])


def noam_schedules(total_steps: int) -> dict[str, Schedule]:
    """The paper's schedule (section 5.3) for three pairs of width and warm-up."""
    return {
        f"d_model {width}, warm-up {warmup:,}": Schedule(
            "noam", 1.0, warmup, total_steps, d_model=width
        )
        for width, warmup in ((512, 4000), (512, 8000), (256, 4000))
    }


def every_schedule(
    learning_rate: float, warmup_steps: int, total_steps: int, final_fraction: float = 0.0
) -> dict[str, Schedule]:
    """All schedules with one peak: ``noam`` is ``inverse_sqrt`` then, and left out."""
    return {
        name: Schedule(name, learning_rate, warmup_steps, total_steps, final_fraction)
        for name in SCHEDULES
        if name != "noam"
    }


def draw_schedules(panels: Mapping[str, Mapping[str, Schedule]]) -> Figure:
    """A panel for each group, by its title; in it a curve for each schedule, by its name."""
    figure = new_figure(6.0 * len(panels), 4.2)
    for axes, (title, schedules) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for name, schedule in schedules.items():
            axes.plot(*schedule_curve(schedule), label=name)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("learning rate")
        axes.set_ylim(bottom=0.0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        axes.grid(alpha=0.3)
        axes.legend()
    return figure
