"""The compiled ops against their twins in plain PyTorch, on this machine: forward and gradients.

Small problems of every op, in each type of a device. The root mean square error of each result
against float64 is at most twice that of the twin in the same type on the same device, where there
are numbers enough for that not to be chance, and some roundings; the greatest error is at most four
times that of the twin, and some; and a second run gives the same bits.
``python -m transformer_ext.info --check`` prints it, a training on a GPU begins with it.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transformer_ext import ops
from transformer_ext.ops import _tensor_cores
from transformer_ext.ops._backend import (
    _DTYPES,
    backend,
    has_kernel,
    problem_on,
    refuse,
    set_backend,
    why_not,
)
from transformer_ext.ops.activation import KINDS, is_gated
from transformer_ext.ops.attention import (
    cross_attention_packed_reference,
    self_attention_packed_reference,
)
from transformer_ext.ops.dropout import dropout_reference
from transformer_ext.packed import Packed

__all__ = [
    "SMALL",
    "Case",
    "Row",
    "Sizes",
    "allowed_error",
    "attention_on_tensor_cores",
    "cases",
    "check",
    "guard",
    "max_error",
    "results",
    "rms_error",
]


@dataclass(frozen=True)
class Sizes:
    """The shapes of the problems."""

    rows: int = 37
    columns: tuple[int, ...] = (5, 64, 520, 2056)
    outputs: int = 71
    inner: int = 72
    scores: tuple[tuple[int, ...], ...] = ((2, 3, 5, 3), (2, 3, 5, 128), (2, 3, 5, 1100))
    words: tuple[int, ...] = (3, 1001, 9000)
    features: int = 24
    # Of every class of lengths that the kernels of attention tell apart.
    lengths: tuple[int, ...] = (1, 7, 33, 64, 20, 129, 100)
    heads: int = 2
    head_dims: tuple[int, ...] = (32, 64, 80, 128)


SMALL = Sizes()


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        op: what it belongs to, for people.
        raw: the raw ops without which the op runs on its twin.
        function, twin: the op and its twin.
        arguments: of both, by name; tensors on the CPU, floating ones in the type of the case or,
            parameters, in float32. The gradients of those that want one are compared.
        tensor_cores: the type and head_dim of the kernels of attention that are meant.
    """

    op: str
    raw: tuple[str, ...]
    function: Callable[..., Any]
    twin: Callable[..., Any]
    arguments: Mapping[str, Any]
    tensor_cores: bool = False

    def describe(self) -> str:
        """The call, for people."""
        parts = []
        for name, value in self.arguments.items():
            if isinstance(value, Tensor):
                value = list(value.shape)
            elif isinstance(value, Packed):
                value = f"lengths {value.lengths.tolist()}"
            parts.append(f"{name} {value}")
        return f"{self.function.__name__}({', '.join(parts)})"


@dataclass
class Row:
    """What came of the cases of one op in one type.

    Attributes:
        op: the op.
        dtype: the type, as torch names it.
        raw: the raw ops that it needs.
        cases: how many calls were compared.
        share: the greatest error of all, as a share of what is allowed.
        problem: the first thing that is wrong, or empty.
        device_lost: whether CUDA has failed for good, in this process.
    """

    op: str
    dtype: str
    raw: tuple[str, ...] = ()
    cases: int = 0
    share: float = 0.0
    problem: str = ""
    device_lost: bool = False

    @property
    def agrees(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problem

    @property
    def cure(self) -> str:
        """What to do where something is."""
        if self.raw:
            return "TRANSFORMER_EXT_BACKEND=reference in the environment takes plain PyTorch"
        return f"{_tensor_cores.VARIABLE}=simple in the environment takes the simple kernels"


# What is compared ---------------------------------------------------------------------------------


class _Inputs:
    """Tensors from a generator of their own: torch's is left as it is."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._generator = torch.Generator("cpu").manual_seed(0)

    def plain(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float32, device="cpu")

    def activations(self, *shape: int) -> Tensor:
        return self.plain(*shape).to(self._dtype).requires_grad_()

    def parameter(self, *shape: int) -> Tensor:
        return self.plain(*shape).requires_grad_()


def _rng() -> Tensor:
    return torch.tensor([1, 2, 3], device="cpu")


def _dropped() -> dict[str, Any]:
    return {"dropout_p": 0.1, "rng": _rng(), "site": 4}


def cases(dtype: torch.dtype, sizes: Sizes = SMALL) -> Iterator[Case]:
    """Calls of every op."""
    make = _Inputs(dtype)
    rows = sizes.rows
    for columns in sizes.columns:
        x, residual = make.activations(rows, columns), make.activations(rows, columns)
        weight, bias = make.parameter(columns), make.parameter(columns)
        norm = ("residual_norm_forward",)
        yield Case(
            "residual + dropout + norm",
            norm,
            ops.residual_norm,
            ops.residual_norm_reference,
            {"x": x, "residual": residual, "weight": weight, "bias": bias, **_dropped()},
        )
        yield Case(
            "norm",
            norm,
            ops.norm,
            ops.norm_reference,
            {"x": x, "weight": weight, "bias": None, "kind": "rms"},
        )
        yield Case(
            "residual + dropout",
            ("residual_dropout",),
            ops.residual_dropout,
            ops.residual_dropout_reference,
            {"x": x, "residual": residual, **_dropped()},
        )
        yield Case(
            "dropout",
            ("residual_dropout",),
            ops.dropout,
            dropout_reference,
            {"x": x, "p": 0.3, "rng": _rng(), "site": 7},
        )
        ids = torch.arange(rows, device="cpu") ** 2 % 101
        yield Case(
            "embedding",
            ("embedding_forward",),
            ops.embedding,
            ops.embedding_reference,
            {
                "ids": ids,
                "weight": make.parameter(101, columns),
                "scale": 3.0,
                "positions": ids % 9,
                "position_table": make.parameter(9, columns),
                "dtype": dtype,
                **_dropped(),
            },
        )
        yield Case(
            "linear, column sums",
            ("gemm_linear_", "gemm_matmul_", "column_sum_"),
            ops.linear,
            ops.linear_reference,
            {
                "x": x,
                "weight": make.parameter(sizes.outputs, columns),
                "bias": make.parameter(sizes.outputs),
            },
        )
    for kind in KINDS:
        columns = sizes.inner * (2 if is_gated(kind) else 1)
        yield Case(
            "activation",
            ("activation_forward",),
            ops.activation,
            ops.activation_reference,
            {
                "x": make.activations(rows, columns),
                "bias": make.parameter(columns),
                "kind": kind,
                **_dropped(),
            },
        )
    for shape in sizes.scores:
        x = make.activations(*shape)
        lengths = torch.arange(shape[0], device="cpu") * 7 % shape[-1]
        for function, twin in (
            (ops.masked_softmax, ops.masked_softmax_reference),
            (ops.masked_log_softmax, ops.masked_log_softmax_reference),
        ):
            options = {"mask": make.plain(shape[0], 1, 1, shape[-1]) < 1, "key_lengths": lengths}
            for masks in (options, {"causal": True}):
                yield Case("masked softmax", ("masked_softmax",), function, twin, {"x": x, **masks})
    for words in sizes.words:
        targets = torch.arange(rows, device="cpu") % words
        targets[::5] = -100
        yield Case(
            "linear + cross entropy",
            ("cross_entropy_",),
            ops.linear_cross_entropy,
            ops.linear_cross_entropy_reference,
            {
                "x": make.activations(rows, sizes.features),
                "weight": make.parameter(words, sizes.features),
                "targets": targets,
                "bias": make.parameter(words),
                "normalizer": 7.0,
            },
        )
        yield Case(
            "cross entropy",
            ("cross_entropy",),
            ops.label_smoothing_loss,
            ops.label_smoothing_loss_reference,
            {"logits": make.activations(min(rows, 1000), words), "targets": targets[:1000]},
        )
    for head_dim in sizes.head_dims:
        yield from _attention_cases(make, head_dim, sizes)


def _attention_cases(
    make: _Inputs, head_dim: int, sizes: Sizes = SMALL, tensor_cores: bool = False
) -> Iterator[Case]:
    """Of packed batches with slack rows, which hold NaN, and of padded ones."""
    heads, total = sizes.heads, sum(sizes.lengths)
    raw = ("attention_forward",)
    name = "attention"
    if tensor_cores:
        name = f"attention on the tensor cores, heads of {head_dim}"

    def rows(width: int) -> Tensor:
        x = make.activations(total + 3, width)
        with torch.no_grad():
            x[total:] = torch.nan
        return x

    here, there = (
        Packed.from_lengths(lengths, total + 3, device="cpu")
        for lengths in (sizes.lengths, sizes.lengths[::-1])
    )
    for causal in (False, True):
        arguments: dict[str, Any] = {"heads": heads, "kv_heads": heads, "packed": here}
        yield Case(
            name,
            raw,
            ops.self_attention_packed,
            self_attention_packed_reference,
            {"qkv": rows(3 * heads * head_dim), **arguments, "causal": causal, **_dropped()},
            tensor_cores,
        )
    yield Case(
        name,
        raw,
        ops.cross_attention_packed,
        cross_attention_packed_reference,
        {
            "query": rows(heads * head_dim),
            "kv": rows(2 * head_dim),
            "heads": heads,
            "kv_heads": 1,
            "packed_q": here,
            "packed_k": there,
        },
        tensor_cores,
    )
    x = {part: make.activations(3, heads, 37, head_dim) for part in ("query", "key", "value")}
    options: list[dict[str, Any]] = [
        {"key_lengths": torch.tensor([37, 0, 20], device="cpu")},
        {"causal": True, **_dropped()},
    ]
    if not tensor_cores:
        options.append({"mask": make.plain(3, 1, 37, 37) < 1})
    for masks in options:
        function, twin = ops.attention, ops.attention_reference
        yield Case(name, raw, function, twin, {**x, **masks}, tensor_cores)


# The comparison -----------------------------------------------------------------------------------


def max_error(got: Tensor, exact: Tensor) -> float:
    """Greatest absolute difference, as computed on the CPU; equal infinities differ by 0."""
    difference = _difference(got, exact)
    return difference.max().item() if difference.numel() else 0.0


def rms_error(got: Tensor, exact: Tensor) -> float:
    """Root of the mean of the squared differences, with infinities as in :func:`max_error`."""
    difference = _difference(got, exact)
    return difference.square().mean().sqrt().item() if difference.numel() else 0.0


def _difference(got: Tensor, exact: Tensor) -> Tensor:
    got, exact = got.detach().cpu().double(), exact.detach().cpu().double()
    return torch.where(got == exact, 0.0, got - exact).abs()


def allowed_error(
    exact: Tensor, peer: Tensor, *, factor: float = 2.0, roundings: float = 1.0
) -> float:
    """The greatest error that a result may have.

    Args:
        exact: the result in float64. peer: that of a plain composition in the type in question.
        factor: of the peer's error.
        roundings: of the greatest result, allowed besides: the peer may be exact by chance.
    """
    finite = exact.detach().double().abs()
    finite = finite[finite.isfinite()]
    greatest = finite.max().item() if finite.numel() else 0.0
    rounding = torch.finfo(peer.dtype).eps / 2
    return factor * max_error(peer, exact) + roundings * rounding * greatest


def _errors(
    ours: Tensor, exact: Tensor, peer: Tensor, dtype: str
) -> dict[str, tuple[float, float]]:
    """Each kind of error of a result, and what is allowed of it."""
    # A GPU's exp is some roundings of float32 off, and few numbers make the peer's error chance.
    roundings = 16.0 if peer.dtype == torch.float32 else 4.0
    if exact.numel() < 16:
        # A loss is float32, and made of numbers of the type of the case.
        coarse = torch.finfo(getattr(torch, dtype)).eps / torch.finfo(peer.dtype).eps
        limit = allowed_error(exact, peer, factor=32, roundings=max(roundings, 4 * coarse))
        return {"an error": (max_error(ours, exact), limit)}
    limit = allowed_error(exact, peer, factor=4, roundings=roundings)
    found = {"an error": (max_error(ours, exact), limit)}
    if exact.numel() >= 512:
        # The greatest error of thousands of numbers is that of one outlier.
        finite = exact.detach().double()
        finite = torch.where(finite.isfinite(), finite, 0.0)
        limit = 2 * rms_error(peer, exact)
        limit += roundings * torch.finfo(peer.dtype).eps / 2 * finite.square().mean().sqrt().item()
        found["a root mean square error"] = rms_error(ours, exact), limit
    return found


def _on(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """An argument there; floating tensors as leaves, in ``dtype`` unless that is None."""
    if isinstance(value, Packed):
        return value.to(device)
    if isinstance(value, torch.dtype):
        return dtype or value
    if not isinstance(value, Tensor):
        return value
    if not value.is_floating_point():
        return value.to(device)
    return value.detach().to(device, dtype).requires_grad_(value.requires_grad)


def results(
    function: Callable[..., Any],
    case: Case,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """What a function gives for the case's arguments, and the gradients of those that want one.

    Args:
        function: the case's function or its twin.
        case: has the arguments.
        device: to compute on.
        dtype: of all floating arguments; None: as they are.
    """
    arguments = {name: _on(value, device, dtype) for name, value in case.arguments.items()}
    outputs = function(**arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    floating = [x for x in outputs if x.is_floating_point()]
    found = {f"result {i}" if i else "the result": x.detach() for i, x in enumerate(floating)}
    leaves = {
        name: value
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.requires_grad
    }
    differentiable = [x for x in floating if x.requires_grad]
    make = _Inputs(torch.float32)
    # As precise in every type: what is compared begins with the same numbers.
    grads = [make.plain(*x.shape).bfloat16().to(x.device, x.dtype) for x in differentiable]
    made = torch.autograd.grad(differentiable, list(leaves.values()), grads)
    return found | {f"the gradient of {n}": g for n, g in zip(leaves, made, strict=True)}


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Neither the caller's modes reach what is inside, nor does that reach the caller."""
    waiting = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in {"cpu", device.type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
            # The caller's, such as those that keep tensors on the host, are for his own.
            as_is = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
            stack.enter_context(as_is)
        if waiting:
            torch.cuda.set_sync_debug_mode(0)
            stack.callback(torch.cuda.set_sync_debug_mode, waiting)
        yield


def _compare(case: Case, device: torch.device, row: Row) -> None:
    """Adds a case to the row of its op."""
    row.cases += 1
    where = f"{row.op} ({row.dtype}) on {device}, {case.describe()}"
    for op in case.raw:
        # Without its kernel the twin would be compared with itself.
        reason = has_kernel(op, device.type) and why_not(op, device, getattr(torch, row.dtype))
        if reason:
            row.problem = row.problem or f"{where}: {reason}"
            return
    try:
        with _tensor_cores.only(case.tensor_cores):
            got, again = (results(case.function, case, device) for _ in range(2))
            got = {name: x.cpu() for name, x in got.items()}
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError, ValueError) as failed:
        row.problem = row.problem or f"{where}: {(str(failed) or repr(failed)).splitlines()[0]}"
        row.device_lost = _is_lost(device)
        return
    exact = results(case.twin, case, torch.device("cpu"), torch.float64)
    peer = results(case.twin, case, device)
    for name, ours in got.items():
        found = ""
        if ours.dtype != peer[name].dtype or ours.shape != peer[name].shape:
            found = f"is {ours.dtype} {list(ours.shape)}"
            found += f", not {peer[name].dtype} {list(peer[name].shape)}"
        else:
            errors = _errors(ours, exact[name], peer[name], row.dtype)
            for kind, (error, limit) in errors.items():
                if not error <= limit:  # NaN
                    found = found or f"has {kind} of {error:.3g}, allowed is {limit:.3g}"
                elif limit:
                    row.share = max(row.share, error / limit)
            if not found and not torch.equal(ours, again[name].cpu()):
                found = "is not the same bits twice"
        if found:
            row.problem = row.problem or f"{where}: {name} {found}"
            return


def _is_lost(device: torch.device) -> bool:
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return False
    except RuntimeError:
        return True


def attention_on_tensor_cores(device: torch.device, dtype: torch.dtype, head_dim: int) -> Row:
    """The kernels of one class; whatever modes the caller is in."""
    row = _new_row(f"attention on the tensor cores, heads of {head_dim}", dtype)
    with _undisturbed(device):
        for case in _attention_cases(_Inputs(dtype), head_dim, tensor_cores=True):
            _compare(case, device, row)
            if row.problem:
                break
    return row


def _new_row(op: str, dtype: torch.dtype) -> Row:
    return Row(op, str(dtype).removeprefix("torch."))


def check(device: torch.device, dtypes: Sequence[torch.dtype] | None = None) -> list[Row]:
    """All ops that have compiled kernels for the device.

    Args:
        device: the CPU or a GPU.
        dtypes: those to check of the types of its kernels; None: all.

    Returns:
        A row for each op and type; none where no compiled op runs on the device.
    """
    rows: list[Row] = []
    if problem_on(device):
        return rows
    for dtype in _DTYPES[device.type]:
        if dtypes is not None and dtype not in dtypes:
            continue
        found: dict[str, Row] = {}
        with _undisturbed(device), set_backend("auto"):
            for case in cases(dtype):
                raw = tuple(op for op in case.raw if has_kernel(op, device.type))
                if not raw:
                    continue
                row = found.setdefault(case.op, _new_row(case.op, dtype))
                row.raw = raw
                _compare(case, device, row)
                if row.device_lost:
                    return [*rows, *found.values()]
        rows += found.values()
        if dtype.itemsize == 2 and found and _tensor_cores.exist_on(device):
            for head_dim in _tensor_cores.HEAD_DIMS:
                with set_backend("auto"):
                    row = attention_on_tensor_cores(device, dtype, head_dim)
                _tensor_cores.settle(device, dtype, head_dim, row.agrees)
                rows.append(row)
                if row.device_lost:
                    return rows
    return rows


_GUARDED = "cuda"
_guarded: set[tuple[torch.device, torch.dtype]] = set()


def guard(device: torch.device, dtype: torch.dtype) -> str:
    """Before the first work on a GPU: what fails the check runs on its twin from then on.

    Says so on stderr, a line for each op. Nothing is done on a CPU, where the tests have been, nor
    a second time, nor where plain PyTorch was asked for.

    Returns:
        For people, what was found; empty where nothing was done.

    Raises:
        RuntimeError: an op has failed that the backend ``compiled`` has no twin for, or the device
            with it.
        ValueError: the variable of the environment for attention is none of its values.
    """
    if device.type == _GUARDED:
        _tensor_cores.asked()
    if device.type != _GUARDED or backend() == "reference" or (device, dtype) in _guarded:
        return ""
    _guarded.add((device, dtype))
    began = time.monotonic()
    rows = check(device, [dtype])
    failed = [row for row in rows if not row.agrees]
    for row in failed:
        if row.device_lost:
            raise RuntimeError(f"{row.problem}. {row.cure}")
        for raw in row.raw:
            refuse(raw, device.type, f"{raw}: the compiled kernel has failed its check")
    for row in failed:
        if row.raw and backend() == "compiled":
            raise RuntimeError(f"{row.problem}. {row.cure}")
        instead = (
            "plain PyTorch takes its place" if row.raw else _tensor_cores.what_takes_their_place()
        )
        print(f"transformer_ext: warning: {row.problem}; {instead}", file=sys.stderr)
    if not rows:
        return ""
    seconds = time.monotonic() - began
    if failed:
        return f"{len(failed)} of {len(rows)} compiled ops failed their check ({seconds:.1f} s)"
    return f"all {len(rows)} compiled ops agree with plain PyTorch ({seconds:.1f} s)"
