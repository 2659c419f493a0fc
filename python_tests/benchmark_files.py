"""Modules of ``benchmarks/``, which is no package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def benchmark(name):
    file = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", file)
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
