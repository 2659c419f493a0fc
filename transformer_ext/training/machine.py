"""What a training runs on: the processes, the device, threads, precision, and the kernels in use."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any

import torch

from transformer_ext import __version__, info
from transformer_ext.config import TrainConfig
from transformer_ext.data.corpus import counted
from transformer_ext.ops import backend
from transformer_ext.ops._check import guard
from transformer_ext.training import distributed
from transformer_ext.training.distributed import World
from transformer_ext.training.environment import (
    choose_device,
    choose_precision,
    describe_device,
    keep_freed_memory,
)
from transformer_ext.training.report import Console

__all__ = ["Machine"]


@dataclass(frozen=True)
class Machine:
    """What this process trains on.

    Attributes:
        world: The processes that train together.
        precision: Type of the activations.
        threads: CPU threads of this process.
        system: What ``python -m transformer_ext.info`` reports.
    """

    world: World
    precision: str
    threads: int
    system: dict[str, Any]

    @staticmethod
    def join(config: TrainConfig) -> Machine:
        """Sets this process up for training, and joins the others.

        Raises:
            ValueError: A device or a precision that is not to be had here, or a variable of the
                environment that is none of its values.
        """
        keep_freed_memory()
        device = choose_device(config.training.device, distributed.local_rank())
        if device.type == "cuda":
            torch.cuda.set_device(device)
        system = info.collect()
        threads = config.training.threads or system["cpu"].get("default_threads")
        if threads:
            torch.set_num_threads(threads)
        precision = choose_precision(
            config.training.precision, device, system["cpu"].get("features")
        )
        return Machine(World.join(device), precision, torch.get_num_threads(), system)

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.world.device

    @property
    def device_name(self) -> str:
        """The device for people, such as the name of the CPU."""
        return describe_device(self.device, self.system["system"]["cpu"])

    def versions(self) -> dict[str, str]:
        """Versions of this package, Python and what it computes with."""
        return {
            "transformer_ext": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            **self.system["system"]["packages"],
        }

    def facts(self) -> dict[str, Any]:
        """What the bits of a result depend on beside the configuration."""
        return {
            "torch": torch.__version__,
            "threads": self.threads,
            "processes": self.world.size,
            "device": self.device_name,
            "precision": self.precision,
            "backend": backend(),
            "transformer_ext": __version__,
        }

    def kernels(self) -> str:
        """Which implementation of the ops is in use, for people."""
        cpu, torch_facts, device = self.system["cpu"], self.system["torch"], self.device.type
        if backend() == "reference":
            return "plain PyTorch, as asked for (TRANSFORMER_EXT_BACKEND)"
        if device not in ("cpu", "cuda") or not torch_facts.get(f"{device}_ops"):
            return "plain PyTorch (python -m transformer_ext.info says why)"
        if device == "cuda":
            return "compiled"
        products = ", ".join(
            f"{entry['product']} {entry['library']}"
            for entry in torch_facts.get("gemm") or []
            if entry["dtype"] == self.precision
        )
        isa = f", {cpu['isa']}" if cpu else ""  # The ops may load where the engine does not.
        return f"compiled{isa}" + (f"; matrix products: {products}" if products else "")

    def print(self, console: Console, output: str) -> None:
        """Says what is used, and where the results go."""
        console.print(
            f"transformer_ext {__version__}, torch {torch.__version__}, "
            f"Python {platform.python_version()}"
        )
        processes = f"{self.world.size} processes, " if self.world.size > 1 else ""
        threads = counted(self.threads, "threads")
        console.print(f"device     {processes}{self.device_name}, {threads}, {self.precision}")
        console.print(f"kernels    {self.kernels()}")
        console.print(f"output     {output}")

    def check_kernels(self, console: Console) -> None:
        """On a GPU: compiled ops that do not compute what PyTorch does are put aside, and named."""
        found = guard(self.device, getattr(torch, self.precision))
        if found:
            console.print(f"check      {found}")
