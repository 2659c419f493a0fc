"""Every op on a stream that is not the default one, and on a GPU that is not the current one."""

import dataclasses

import pytest
import torch
from kernel_testing import moved, needs_gpu, set_backend

from transformer_ext.ops._check import cases, results

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")


@pytest.mark.parametrize("kernels", ["tensor", "simple"])
@pytest.mark.parametrize(
    "device",
    [pytest.param("cuda:0", marks=needs_gpu), pytest.param("cuda:1", marks=two_gpus)],
)
def test_every_op_runs_where_and_when_its_inputs_are_there_on_a_gpu(device, kernels, monkeypatch):
    monkeypatch.setenv("TRANSFORMER_EXT_CUDA_ATTENTION", kernels)
    first, device = torch.device("cuda:0"), torch.device(device)
    side = torch.cuda.Stream(device)
    for case in cases(torch.bfloat16):
        there = dataclasses.replace(case, arguments=moved(case.arguments, device))
        with torch.no_grad(), set_backend("compiled"):
            late = [
                (x, x.clone())
                for x in there.arguments.values()
                if isinstance(x, torch.Tensor) and x.is_floating_point()
            ]
            for x, _ in late:
                x.fill_(torch.nan)
            torch.cuda.synchronize(device)
            with torch.cuda.stream(side):
                # What does not wait for this stream reads NaN.
                torch.cuda._sleep(10_000_000)
                for x, numbers in late:
                    x.copy_(numbers)
                with torch.enable_grad(), torch.cuda.device(first):
                    got = results(there.function, there, device)
                    assert torch.cuda.current_device() == first.index
            torch.cuda.synchronize(device)
            with torch.enable_grad():
                expected = results(case.function, case, first)
        for name, true in expected.items():
            assert got[name].device == device, f"{case.op}: {name}"
            assert torch.equal(got[name].cpu(), true.cpu()), f"{case.op}: {name}"
