"""The tests of the kernels once more, with each lower instruction set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_testing import ISAS, needs_compiled

# By file, the tests whose results depend on it, as pytest's -k has them. (test_linear.py has its own.)
SELECTED = {
    "test_activation.py": "precision or nan",
    "test_attention.py": "precision or bias or leaks or masked_rows or twins or tokens",
    "test_cross_entropy.py": "float64 or given or great or arg_max or whatever or sums",
    "test_dropout.py": "same_bits",
    "test_embedding.py": "precision or slack",
    "test_residual_norm.py": "precision",
    "test_softmax.py": "float64 or masked or great or nan or typed",
}


@needs_compiled
@pytest.mark.parametrize("isa", ISAS[:-1])
def test_kernels_of_a_lower_instruction_set(isa):
    if ISAS.index(isa) > ISAS.index(torch.ops.transformer_ext.isa()):
        pytest.skip(f"this machine does not have {isa}")
    folder = Path(__file__).parent
    # One process for all files: to import torch takes longer than the tests of most of them.
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider"),
            *("-k", " or ".join(f"({file} and ({tests}))" for file, tests in SELECTED.items())),
            *(str(folder / file) for file in SELECTED),
        ],
        cwd=folder.parent,
        # Options of the outer one may change what is run or printed.
        env={
            **{name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"},
            "TRANSFORMER_EXT_ISA": isa,
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for file in SELECTED:
        assert f"{file} " in result.stdout, f"nothing of {file} was run:\n{result.stdout}"
