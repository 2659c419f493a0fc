"""The check of the compiled ops on this machine: what is right passes, every planted fault is found."""

import contextlib
import importlib
import json

import pytest
import torch
from kernel_testing import needs_compiled
from torch._subclasses.fake_tensor import FakeTensorMode

from transformer_ext import info, ops
from transformer_ext.ops import _backend, _check, _tensor_cores
from transformer_ext.packed import Packed

pytestmark = needs_compiled
CPU = torch.device("cpu")


def test_all_compiled_ops_agree_and_info_says_so(capsys):
    assert info.main(["--check", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = found["check"]["rows"]
    assert found["problems"] == [] and found["check"]["device"] == "cpu"
    assert all(row["agrees"] and 0 < row["error_of_allowed"] <= 1 for row in rows)
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    # Nothing that is compiled is left out.
    covered = {raw for case in _check.cases(torch.float32) for raw in case.raw}
    forward = {
        name.removeprefix("transformer_ext::").removesuffix(".default")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("transformer_ext::")
        and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
    }
    forward = {name for name in forward if not name.endswith("_backward")}
    assert forward - covered == {"gemm_pack_", "linear_cross_entropy"}


def off(tensor):
    """Changes one number."""
    flat = tensor.view(-1) if tensor.is_contiguous() else tensor[0].reshape(-1)
    with torch.no_grad():
        flat[0] += 0.1 * tensor.float().nan_to_num().abs().max().to(tensor.dtype) + 0.01


def wrong(function, index, calls):
    """An op one number of whose result, or of the argument it writes to, is off."""

    def run(*arguments):
        calls.append(arguments)
        found = function(*arguments)
        where = arguments if found is None else found
        off(where[index] if isinstance(where, tuple) else where)
        return found

    return run


def plant(monkeypatch, name, make):
    """Puts a wrong kernel in the place of a raw op: of an attribute "module.name", or torch's."""
    module, _, attribute = name.rpartition(".")
    owner = torch.ops.transformer_ext
    if module:
        owner = importlib.import_module(f"transformer_ext.ops.{module}")
    monkeypatch.setattr(owner, attribute, make(getattr(owner, attribute)))


FAULTS = [
    # The op, what is replaced, which of its results or arguments is off, and where that is seen.
    ("residual + dropout + norm", "residual_norm._norm_forward", 0, "the result"),
    ("residual + dropout + norm", "residual_norm._norm_forward", 1, "result 1"),
    ("residual + dropout + norm", "residual_norm._norm_backward", 0, "the gradient of x"),
    ("residual + dropout + norm", "residual_norm._norm_backward", 1, "the gradient of residual"),
    ("residual + dropout + norm", "residual_norm._norm_backward", 2, "the gradient of weight"),
    ("residual + dropout + norm", "residual_norm._norm_backward", 3, "the gradient of bias"),
    ("norm", "residual_norm._norm_backward", 1, "the gradient of x"),
    ("residual + dropout", "residual_norm._dropout", None, "the result"),
    ("dropout", "residual_norm._dropout", None, "the result"),
    ("embedding", "embedding._forward", None, "the result"),
    ("embedding", "embedding._backward", None, "the gradient of weight"),
    ("activation", "activation._forward", None, "the result"),
    ("activation", "activation._backward", 0, "the gradient of x"),
    ("activation", "activation._backward", 1, "the gradient of bias"),
    ("masked softmax", "masked_softmax", None, "the result"),
    ("masked softmax", "masked_softmax_backward", None, "the gradient of x"),
    ("linear, column sums", "gemm_linear_", 0, "the result"),
    ("linear, column sums", "gemm_matmul_", 0, "the gradient of weight"),
    ("linear, column sums", "column_sum_", 0, "the gradient of bias"),
    ("linear + cross entropy", "cross_entropy_", None, "the result"),
    ("linear + cross entropy", "column_sum_", 0, "the gradient of bias"),
    ("cross entropy", "cross_entropy", 0, "the result"),
    ("cross entropy", "cross_entropy", 1, "the gradient of logits"),
    ("attention", "attention_forward", 0, "the result"),
    ("attention", "attention_backward", 18, "the gradient of qkv"),
    ("attention", "attention_backward", 19, "the gradient of qkv"),
    ("attention", "attention_backward", 20, "the gradient of qkv"),
]


@pytest.fixture
def only(monkeypatch):
    """Restricts the check to the first cases of one op."""
    every = {dtype: list(_check.cases(dtype)) for dtype in (torch.float32, torch.bfloat16)}

    def restrict(op):
        monkeypatch.setattr(
            _check, "cases", lambda dtype: [case for case in every[dtype] if case.op == op][:2]
        )

    return restrict


def checked(dtype=torch.bfloat16):
    (row,) = _check.check(CPU, [dtype])
    return row


def test_every_wrong_kernel_is_found(only):
    for number, (op, name, index, where) in enumerate(FAULTS):
        dtype = (torch.float32, torch.bfloat16)[number % 2]
        only(op)
        calls = []
        with pytest.MonkeyPatch.context() as patch:
            plant(patch, name, lambda function, i=index, c=calls: wrong(function, i, c))
            row = checked(dtype)
        if not calls and name.startswith("gemm_"):
            continue  # Torch multiplies on this machine.
        assert f": {where} has an error of " in row.problem, (op, name, index, row)
        assert row.problem.startswith(f"{op} ({row.dtype}) on cpu, ")


def test_another_dropout_mask_other_bits_and_what_raises_are_found(only, monkeypatch):
    only("attention")

    def another_site(function):
        return lambda *arguments: function(*arguments[:14], arguments[14] + 1, *arguments[15:])

    with pytest.MonkeyPatch.context() as patch:
        plant(patch, "attention_forward", another_site)
        assert "the result has an error of" in checked().problem
    only("activation")
    calls = []

    def unsteady(function):
        def run(*arguments):
            calls.append(None)
            found = function(*arguments)
            return found.nextafter(found + 1) if len(calls) == 2 else found

        return run

    with pytest.MonkeyPatch.context() as patch:
        plant(patch, "activation._forward", unsteady)
        assert "the result is not the same bits twice" in checked(torch.float32).problem

    def fails(function):
        def run(*arguments):
            raise RuntimeError("activation_forward: invalid device function\nmore")

        return run

    plant(monkeypatch, "activation._forward", fails)
    assert checked().problem.endswith(": activation_forward: invalid device function")


def test_info_names_what_failed_and_what_to_do(only, monkeypatch, capsys):
    only("activation")
    plant(monkeypatch, "activation._backward", lambda function: wrong(function, 1, []))
    assert info.main(["--check", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "activation" in out and "2 cases: FAILED\n" in out
    assert "  0 of 2 agree with plain PyTorch\n" in out
    assert out.count("PROBLEM: ") == 2
    problem = out.splitlines()[-1]
    assert problem.startswith("PROBLEM: activation (bfloat16) on cpu, activation(x [37, 72], bias")
    assert ": the gradient of bias has an error of " in problem
    assert problem.endswith(
        ". TRANSFORMER_EXT_BACKEND=reference in the environment takes plain PyTorch"
    )


def test_info_names_options_that_do_not_fit(capsys, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        info.main(["--device", "cpu"])
    assert stop.value.code == 2
    assert "--device: got 'cpu' without --check" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert info.main(["--check", "--device", "cuda"]) == 2
    assert "error: --device: got 'cuda', but torch sees no CUDA GPU" in capsys.readouterr().err
    monkeypatch.setenv("TRANSFORMER_EXT_CUDA_ATTENTION", "foo")
    assert info.main([]) == 2
    error = "TRANSFORMER_EXT_CUDA_ATTENTION: expected auto, simple or tensor, got 'foo'"
    assert capsys.readouterr() == ("", f"error: {error}\n")
    monkeypatch.setattr(_check, "_GUARDED", "cpu")
    with pytest.raises(ValueError, match=error):
        _check.guard(CPU, torch.float32)


def test_what_fails_before_a_training_runs_on_its_twin(only, monkeypatch, capsys):
    only("activation")
    for name in ("_guarded", "_GUARDED"):
        monkeypatch.setattr(_check, name, {"_guarded": set(), "_GUARDED": "cpu"}[name])
    monkeypatch.setattr(_backend, "_refused", {})
    assert _check.guard(CPU, torch.bfloat16).startswith("all 1 compiled ops agree with plain PyT")
    assert _check.guard(CPU, torch.bfloat16) == ""
    plant(monkeypatch, "activation._backward", lambda function: wrong(function, 0, []))
    assert _check.guard(CPU, torch.float32).startswith("1 of 1 compiled ops failed their check (")
    said = capsys.readouterr().err
    assert said.startswith("transformer_ext: warning: activation (float32) on cpu, activation(x")
    assert said.endswith("; plain PyTorch takes its place\n") and said.count("\n") == 1
    x = torch.randn(5, 8, requires_grad=True)
    ops.activation(x, kind="silu").sum().backward()
    sigmoid = x.detach().sigmoid()
    torch.testing.assert_close(x.grad, sigmoid * (1 + x.detach() * (1 - sigmoid)))
    assert capsys.readouterr().err == ""
    with ops.set_backend("compiled"), pytest.raises(RuntimeError, match="has failed its check"):
        ops.activation(x)
    with ops.set_backend("reference"):
        assert _check.guard(CPU, torch.float16) == ""
    # What no longer runs agrees with nothing.
    _check._guarded.clear()
    assert _check.guard(CPU, torch.bfloat16).startswith("1 of 1 compiled ops failed their check (")
    assert "): activation_forward: the compiled kernel has failed its" in capsys.readouterr().err


@pytest.mark.parametrize("why", ["the backend", "the device"])
def test_a_failed_check_without_a_way_out_ends_the_run(only, monkeypatch, capsys, why):
    only("activation")
    monkeypatch.setattr(_check, "_guarded", set())
    monkeypatch.setattr(_check, "_GUARDED", "cpu")
    monkeypatch.setattr(_backend, "_refused", {})

    def fails(*_):
        raise RuntimeError("activation_forward: unspecified launch failure")

    plant(monkeypatch, "activation._forward", lambda function: fails)
    if why == "the device":
        monkeypatch.setattr(_check, "_is_lost", lambda device: True)
    ended = r": activation_forward: unspecified launch failure\. TRANSFORMER_EXT_BACKEND=reference "
    with (
        ops.set_backend("compiled" if why == "the backend" else "auto"),
        pytest.raises(RuntimeError, match=ended),
    ):
        _check.guard(CPU, torch.bfloat16)
    assert capsys.readouterr().err == ""


def test_info_says_that_nothing_was_checked(monkeypatch, capsys):
    for module in (_backend, _check):
        monkeypatch.setattr(module, "problem_on", lambda device: "the ops do not run: no image")
    assert info.main(["--check", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert out.endswith("PROBLEM: --check: nothing was checked: the ops do not run: no image\n")
    assert "check: nothing was checked\n" in out and " ok, " not in out


def test_many_small_errors_are_found_where_no_single_one_is_great():
    exact, noise = torch.randn(2, 1000, generator=torch.Generator().manual_seed(1)).double()
    peer = (exact + 0.1 * noise).bfloat16()
    for factor, agree in ((1.5, True), (3, False)):
        errors = _check._errors((exact + 0.1 * factor * noise), exact, peer, "bfloat16")
        error, limit = errors["an error"]
        assert error <= limit
        error, limit = errors["a root mean square error"]
        assert (error <= limit) is agree


# --- attention on the tensor cores, with the CPU's kernels in the place of a GPU's ----------------


class Kernels:
    """Counts the calls of both kinds of kernels; those on the tensor cores can be made wrong."""

    def __init__(self):
        self.calls = []
        self.fault = lambda op, arguments, found: None

    def of(self, op):
        def make(function):
            def run(*arguments):
                self.calls.append((op, arguments[-1]))
                found = function(*arguments)
                if arguments[-1]:
                    self.fault(op, arguments, found)
                return found

            return run

        return make


@pytest.fixture
def cpu_for_gpu(monkeypatch):
    monkeypatch.delenv(_tensor_cores.VARIABLE, raising=False)
    monkeypatch.setattr(_tensor_cores, "_DEVICE", "cpu")
    monkeypatch.setattr(_tensor_cores, "_verdicts", {})
    monkeypatch.setattr(_tensor_cores, "_waits", {})
    monkeypatch.setattr(_tensor_cores, "exist_on", lambda device: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.fixture
def graph_of_attention(cpu_for_gpu):
    """Compiles attention; whether the graph takes the tensor cores."""

    def run():
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph

        packed = Packed.from_lengths([4])
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda qkv: ops.self_attention_packed(qkv, 1, 1, packed),
            backend=backend,
            fullgraph=True,
        )
        with torch.no_grad():
            compiled(torch.ones(4, 96, dtype=torch.bfloat16))
        torch._dynamo.reset()
        op = torch.ops.transformer_ext.attention_forward
        (node,) = [node for node in graphs[0].graph.nodes if node.target is op]
        return node.args[-1]

    return run


@pytest.fixture
def kernels(monkeypatch, cpu_for_gpu):
    found = Kernels()
    for op in ("attention_forward", "attention_backward"):
        plant(monkeypatch, op, found.of(op))
    return found


def attend(kernels, head_dim=32, dtype=torch.bfloat16):
    """One call, forward and backward; which kernels it took, behind those of a trial."""
    qkv = torch.linspace(-1, 1, 9 * 3 * head_dim).view(9, -1).to(dtype).requires_grad_()
    out = ops.self_attention_packed(qkv, 1, 1, Packed.from_lengths([9]), True)
    taken = kernels.calls[-1]
    (grad,) = torch.autograd.grad(out.float().square().sum(), qkv)
    assert taken[1] == kernels.calls[-1][1]
    return taken[1], out.detach(), grad


def test_tensor_cores_are_taken_after_a_trial(kernels, capsys):
    state = torch.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        qkv = torch.ones(4, 96, dtype=torch.bfloat16)
        for scope in (torch.inference_mode, contextlib.nullcontext):
            with scope():
                ops.self_attention_packed(qkv, 1, 1, Packed.from_lengths([4]))
        assert torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    trial = len(kernels.calls)
    assert all(taken for _, taken in kernels.calls) and trial > 10
    assert attend(kernels)[0] and len(kernels.calls) == trial + 2
    # Another class has a trial of its own; what has no such kernels has none.
    assert attend(kernels, 64)[0] and len(kernels.calls) > 2 * trial
    trial = len(kernels.calls)
    assert not attend(kernels, 16)[0] and not attend(kernels, dtype=torch.float32)[0]
    assert len(kernels.calls) == trial + 4 and capsys.readouterr().err == ""


def test_a_mask_takes_the_simple_kernels(kernels):
    x = torch.ones(1, 1, 3, 32, dtype=torch.bfloat16)
    ops.attention(x, x, x, mask=torch.ones(3, 3, dtype=torch.bool))
    assert kernels.calls == [("attention_forward", False)]


def test_tensor_cores_that_fail_their_trial_are_left_alone(kernels, monkeypatch, capsys):
    monkeypatch.setenv(_tensor_cores.VARIABLE, "simple")
    taken, *expected = attend(kernels)
    assert not taken and len(kernels.calls) == 2
    monkeypatch.delenv(_tensor_cores.VARIABLE)

    def raises(op, arguments, found):
        if op == "attention_backward":
            raise RuntimeError("attention_backward: too many resources requested for launch")

    faults = {
        "the result has an error of ": lambda op, a, x: op.endswith("forward") and off(x[0]),
        "the gradient of qkv has an error of ": lambda op, a, x: (
            op.endswith("backward") and off(a[19])
        ),
        ": attention_backward: too many resources requested for launch;": raises,
    }
    for named, fault in faults.items():
        monkeypatch.setattr(_tensor_cores, "_verdicts", {})
        kernels.fault = fault
        for _ in range(2):
            taken, *found = attend(kernels)
            assert not taken
            assert all(map(torch.equal, found, expected))
        said = capsys.readouterr().err
        assert named in said and said.count("\n") == 1
        assert said.startswith(
            "transformer_ext: attention on the tensor cores, heads of 32 (bfloat16) on cpu"
        )
        assert said.endswith("; the simple kernels compute this attention from now on\n")
    monkeypatch.setattr(_tensor_cores, "_verdicts", {})
    monkeypatch.setattr(_check, "_is_lost", lambda device: True)
    with pytest.raises(RuntimeError, match="for launch. TRANSFORMER_EXT_CUDA_ATTENTION=simple in"):
        attend(kernels)
    assert capsys.readouterr().err == ""


def test_the_words_are_those_of_the_kernels_in_use(monkeypatch, capsys):
    row = _check.Row("attention", "bfloat16", problem="it is wrong")
    monkeypatch.setattr(_check, "_GUARDED", "cpu")
    monkeypatch.setattr(_check, "check", lambda device, dtypes: [row])
    for choice, words in (
        ("auto", "the simple kernels take its place"),
        ("simple", "nothing changes, TRANSFORMER_EXT_CUDA_ATTENTION=simple never takes it"),
        ("tensor", "TRANSFORMER_EXT_CUDA_ATTENTION=tensor takes it nevertheless, =simple takes"),
    ):
        monkeypatch.setattr(_check, "_guarded", set())
        monkeypatch.setenv(_tensor_cores.VARIABLE, choice)
        _check.guard(CPU, torch.bfloat16)
        said = capsys.readouterr().err
        assert said.startswith(f"transformer_ext: warning: it is wrong; {words}"), choice


def test_the_environment_decides_without_a_trial(kernels, monkeypatch):
    kernels.fault = lambda op, arguments, found: None if found is None else off(found[0])
    for choice, taken in (("simple", False), ("tensor", True)):
        monkeypatch.setenv(_tensor_cores.VARIABLE, choice)
        assert attend(kernels)[0] is taken
    assert len(kernels.calls) == 4 and not _tensor_cores._verdicts
    monkeypatch.setenv(_tensor_cores.VARIABLE, "fast")
    with pytest.raises(ValueError, match="expected auto, simple or tensor, got 'fast'"):
        attend(kernels)


def test_no_trial_where_the_device_cannot_be_waited_for(kernels, monkeypatch):
    def untried():
        assert not attend(kernels)[0] and len(kernels.calls) == 2
        assert not _tensor_cores._verdicts
        kernels.calls.clear()

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        untried()
    with _tensor_cores._trial:  # A thread in its trial.
        untried()
    with monkeypatch.context() as patch:
        calls, attempts = [], []

        def full(*_):
            attempts.append(len(calls))
            raise torch.OutOfMemoryError

        patch.setattr(_check, "attention_on_tensor_cores", full)
        # Each attempt waits for twice as many calls as the one before.
        while len(calls) < 13:
            untried()
            calls.append(None)
        assert attempts == [0, 2, 5, 10]
    _tensor_cores._waits.clear()
    with FakeTensorMode():
        assert not _tensor_cores.allowed(torch.empty(4, 32, dtype=torch.bfloat16), 32)
    assert not _tensor_cores._verdicts
    # What is known holds while a graph is recorded.
    assert attend(kernels)[0]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert attend(kernels)[0]


def test_a_compiled_function_has_no_trial(graph_of_attention):
    taken = graph_of_attention()
    assert not taken and not _tensor_cores._verdicts
    _tensor_cores._verdicts[0, "bfloat16", 32] = True
    assert graph_of_attention()
