"""linear and the matrix product behind it: precision, invariance of rows, caches, autograd."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest
import torch
from kernel_testing import (
    BACKENDS,
    ISAS,
    assert_as_precise,
    max_error,
    needs_compiled,
    needs_gpu,
    threads,
)
from torch import nn

from transformer_ext.ops import linear, linear_reference, set_backend
from transformer_ext.ops.linear import (
    _copies,
    forget_copies,
    gemm_choices,
    product,
    product_input,
    product_weight,
    weight_for,
)

SHAPES = [
    (1, 1, 1),
    (2, 3, 5),
    (3, 65, 257),
    (5, 64, 256),
    (6, 130, 31),
    (7, 200, 513),
    (97, 129, 300),
    (193, 100, 64),
    (300, 511, 1030),
]


def _tensors(rows, out, inputs, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    weight = torch.randn(out, inputs, generator=generator) / max(inputs, 1) ** 0.5
    bias = torch.randn(out, generator=generator)
    return x, weight, bias


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_as_precise_as_torch(shape, with_bias, dtype, backend):
    x, weight, bias = _tensors(*shape, dtype)
    x.requires_grad_()
    weight.requires_grad_()
    bias = bias.requires_grad_() if with_bias else None
    grad = torch.randn(shape[0], shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    parameters = [x, weight] + ([bias] if with_bias else [])

    def run(function, tensors, cotangent):
        y = function(*tensors)
        return [y, *torch.autograd.grad(y, tensors, cotangent)]

    with set_backend("auto" if backend == "compiled" else backend):
        got = run(linear, parameters, grad)
    peer = run(linear_reference, parameters, grad)
    exact = run(
        linear_reference, [t.detach().double().requires_grad_() for t in parameters], grad.double()
    )
    assert [t.dtype for t in got] == [dtype, dtype, torch.float32] + [torch.float32] * with_bias
    for ours, theirs, true in zip(got, peer, exact, strict=True):
        assert_as_precise(ours, true, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_and_leading_dimensions(backend):
    x, weight, bias = _tensors(24, 40, 70)
    expected = linear_reference(x, weight, bias)
    views = [
        x.t().contiguous().t(),
        torch.stack([x, x], -1)[..., 0],
        torch.cat([x, torch.full_like(x, torch.nan)], 1)[:, :70],
        x[:1].expand(24, -1),
    ]
    with set_backend("auto" if backend == "compiled" else backend):
        for view in views:
            got = linear(view, weight, bias)
            assert max_error(got, linear_reference(view, weight, bias)) < 1e-4
        assert max_error(linear(x.view(2, 3, 4, 70), weight, bias).view(24, 40), expected) < 1e-4
        wide = torch.cat([weight, torch.full_like(weight, torch.nan)], 1)[:, :70]
        assert max_error(linear(x, wide, bias), expected) < 1e-4
        turned = weight.t().contiguous().t()
        assert max_error(linear(x, turned, bias), expected) < 1e-4
        for w in (wide, turned):
            grad = torch.randn(24, 40)
            assert max_error(product_input(grad, w), grad @ weight) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rows(dtype, backend):
    x, weight, bias = _tensors(0, 6, 4, dtype)
    weight.requires_grad_()
    bias.requires_grad_()
    x.requires_grad_()
    with set_backend("auto" if backend == "compiled" else backend):
        y = linear(x.view(2, 0, 4), weight, bias)
        y.sum().backward()
    assert y.shape == (2, 0, 6) and y.dtype == dtype
    assert x.grad.shape == (0, 4)
    assert torch.equal(weight.grad, torch.zeros(6, 4))
    assert torch.equal(bias.grad, torch.zeros(6))


def _skip_torchs(dtype):
    name = str(dtype).removeprefix("torch.")
    if any(c["library"] == "torch" for c in gemm_choices() if c["dtype"] == name):
        pytest.skip(f"on this machine torch multiplies {name}")


@needs_compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_in_any_batch(dtype):
    _skip_torchs(dtype)
    x, weight, bias = _tensors(257, 200, 700, dtype)
    whole = product(x, weight, bias)
    for rows in range(1, 257):
        assert torch.equal(product(x[:rows], weight, bias), whole[:rows]), rows
    for row in range(0, 257, 13):
        assert torch.equal(product(x[row : row + 1], weight, bias), whole[row : row + 1]), row
    # The columns do not see each other either.
    assert torch.equal(product(x, weight[:77].contiguous(), bias[:77]), whole[:, :77])


@needs_compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_for_any_number_of_threads(dtype):
    _skip_torchs(dtype)
    x, weight, bias = _tensors(300, 500, 600, dtype)
    grad = torch.randn(300, 500).to(dtype)
    results = []
    for count in (1, 2, 4):
        with threads(count):
            results.append(
                [product(x, weight, bias), product_input(grad, weight), product_weight(grad, x)]
            )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_compiled
def test_out_and_accumulate_leave_the_padding_alone():
    x, weight, bias = _tensors(19, 70, 33)
    padded = torch.full((19, 80), 7.0)
    assert product(x, weight, bias, out=padded[:, :70]).data_ptr() == padded.data_ptr()
    assert torch.equal(padded[:, :70], product(x, weight, bias))
    assert torch.equal(padded[:, 70:], torch.full((19, 10), 7.0))
    grad = torch.randn(19, 70)
    total = torch.ones(70, 33)
    product_weight(grad, x, out=total, accumulate=True)
    assert max_error(total, 1 + grad.double().t() @ x.double()) < 1e-4
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.full((70, 33), torch.nan)
        product_weight(grad.to(dtype), x.to(dtype), out=out)
        again = out.clone()
        product_weight(grad.to(dtype), x.to(dtype), out=again, accumulate=True)
        assert max_error(again, 2 * out.double()) < 1e-4


@needs_compiled
def test_infinities_and_nans_stay_in_their_row():
    x, weight, bias = _tensors(9, 65, 40)
    clean = product(x, weight, bias)
    x[4, 7], x[5, 3] = torch.nan, torch.inf
    got = product(x, weight, bias)
    assert got[4].isnan().all() and not got[5].isfinite().any()
    keep = [0, 1, 2, 3, 6, 7, 8]
    assert torch.equal(got[keep], clean[keep])


_CHILD = """
import torch, transformer_ext.ops as ops
from transformer_ext.ops.linear import product, product_input, product_weight
torch.manual_seed(0)
assert torch.ops.transformer_ext.isa() == "{isa}"
matmul = torch.ops.transformer_ext.gemm_matmul_
elements = torch.ops.transformer_ext.gemm_packed_elements

def pack(w):
    packed = torch.empty(elements(*w.shape, False))
    torch.ops.transformer_ext.gemm_pack_(packed, w, False)
    return packed

for rows, out, inputs in {shapes}:
    x, w, b = torch.randn(rows, inputs), torch.randn(out, inputs), torch.randn(out)
    y = torch.empty(rows, out)
    torch.ops.transformer_ext.gemm_linear_(y, x, pack(w), b, False)
    exact = x.double() @ w.double().t() + b.double()
    peer = (torch.addmm(b, x, w.t()) - exact).abs().max()
    # Without FMA each product is rounded too.
    factor = 4 if "{isa}" == "baseline" else 2
    assert (y - exact).abs().max() <= factor * peer + 2e-6, (rows, out, inputs)
    for row in range(0, rows, 5):
        one = torch.empty(1, out)
        torch.ops.transformer_ext.gemm_linear_(one, x[row : row + 1], pack(w), b, False)
        assert torch.equal(one, y[row : row + 1])
    g = torch.randn(rows, out)
    grad = torch.empty(out, inputs)
    matmul(grad, g.t(), x, False)
    exact = g.double().t() @ x.double()
    peer = (torch.mm(g.t(), x) - exact).abs().max()
    assert (grad - exact).abs().max() <= factor * peer + 2e-6, (rows, out, inputs)
    if "{isa}" != "avx512_bf16":
        continue
    low, lowg = x.bfloat16().requires_grad_(), g.bfloat16()
    w.requires_grad_()
    ops.linear(low, w, b).backward(lowg)
    rounded = w.detach().bfloat16()
    for got, exact, peer in (
        (low.grad, lowg.double() @ rounded.double(), lowg @ rounded),
        (w.grad, lowg.double().t() @ low.detach().double(), lowg.t() @ low.detach()),
    ):
        assert (got - exact).abs().max() <= 2 * (peer - exact).abs().max() + 2e-6
"""


@needs_compiled
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    environment = {**os.environ, "TRANSFORMER_EXT_ISA": isa}
    code = _CHILD.format(isa=isa, shapes=SHAPES)
    child = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    if "this machine does not have it" in child.stderr and child.returncode:
        pytest.skip(f"this machine has no {isa}")
    assert child.returncode == 0, child.stderr


def test_gradcheck():
    x = torch.randn(2, 3, 5, dtype=torch.double, requires_grad=True)
    weight = torch.randn(4, 5, dtype=torch.double, requires_grad=True)
    bias = torch.randn(4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(linear, (x, weight, bias))
    assert torch.autograd.gradcheck(lambda x, w: linear(x, w), (x, weight))
    assert torch.autograd.gradgradcheck(linear, (x, weight, bias))


def test_second_derivative_in_float32():
    x, weight, bias = _tensors(4, 3, 5)
    x.requires_grad_()
    weight.requires_grad_()
    (first,) = torch.autograd.grad(linear(x, weight, bias).pow(2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), weight)
    (first,) = torch.autograd.grad(
        linear_reference(x, weight, bias).pow(2).sum(), x, create_graph=True
    )
    (expected,) = torch.autograd.grad(first.pow(2).sum(), weight)
    torch.testing.assert_close(second, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_the_gradients_asked_for(needs):
    x, weight, bias = _tensors(4, 3, 5)
    x.requires_grad_(needs[0])
    weight.requires_grad_(needs[1])
    linear(x, weight, bias).sum().backward()
    assert (x.grad is not None, weight.grad is not None, bias.grad is not None) == (*needs, False)


def _pack(weight, dtype=torch.float32, transposed=False):
    n, k = reversed(weight.shape) if transposed else weight.shape
    size = torch.ops.transformer_ext.gemm_packed_elements(n, k, dtype == torch.bfloat16)
    packed = torch.empty(size, dtype=dtype)
    torch.ops.transformer_ext.gemm_pack_(packed, weight, transposed)
    return packed


def _has_bfloat16():
    return torch.ops.transformer_ext.isa() == "avx512_bf16"


@needs_compiled
@pytest.mark.parametrize("shape", [(1, 3, 5), (7, 70, 21), (64, 130, 300), (200, 65, 1025)])
def test_the_bfloat16_product(shape):
    if not _has_bfloat16():
        pytest.skip("the instruction set in use has no bfloat16 products")
    rows, out, inputs = shape
    x, weight, bias = _tensors(rows, out, inputs, torch.bfloat16)
    rounded = weight.bfloat16().double()
    exact = x.double() @ rounded.t() + bias.double()
    packed = _pack(weight, torch.bfloat16)
    linear_, matmul = torch.ops.transformer_ext.gemm_linear_, torch.ops.transformer_ext.gemm_matmul_
    wide = torch.empty(rows, out)
    linear_(wide, x, packed, bias, False)
    tolerance = 1e-6 * inputs**0.5
    assert max_error(wide, exact) <= tolerance + 1e-5
    linear_(wide, x, packed, None, True)
    assert max_error(wide, 2 * exact - bias.double()) <= 3 * tolerance + 1e-5
    # float32 rows are rounded on the way, turned ones are packed: the same bits.
    linear_(wide, x, packed, bias, False)
    for same in (x.float(), x.t().contiguous().t(), x.float().t().contiguous().t()):
        again = torch.empty(rows, out)
        linear_(again, same, packed, bias, False)
        assert torch.equal(again, wide)
    low = torch.empty(rows, out, dtype=torch.bfloat16)
    linear_(low, x, packed, bias, False)
    assert torch.equal(low, wide.bfloat16())
    for row in range(0, rows, 9):
        one = torch.empty(1, out)
        linear_(one, x[row : row + 1], packed, bias, False)
        assert torch.equal(one, wide[row : row + 1])

    grad = torch.randn(rows, out).bfloat16()
    back = torch.empty(rows, inputs)
    linear_(back, grad, _pack(weight, torch.bfloat16, transposed=True), None, False)
    assert max_error(back, grad.double() @ rounded) <= 1e-6 * out**0.5 + 1e-5
    for a in (grad.t(), grad.t().contiguous()):
        total = torch.ones(out, inputs)
        matmul(total, a, x, True)
        assert max_error(total, 1 + grad.double().t() @ x.double()) <= 1e-6 * rows**0.5 + 1e-5


@needs_compiled
def test_a_weight_gradient_of_many_rows():
    # More than one slab of packed rows, and more than one part of turned ones.
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(5000, 900, generator=torch.Generator().manual_seed(0)).to(dtype)
        grad = torch.randn(5000, 1300, generator=torch.Generator().manual_seed(1)).to(dtype)
        exact = grad.double().t() @ x.double()
        assert_as_precise(product_weight(grad, x), exact, torch.mm(grad.t(), x).float())
        results = []
        for count in (1, 2, 4):
            with threads(count):
                results.append(product_weight(grad, x))
        if gemm_choices()[2 if dtype == torch.float32 else 5]["library"] == "transformer_ext":
            assert all(torch.equal(results[0], other) for other in results[1:])


@needs_compiled
def test_opcheck():
    x, weight, bias = _tensors(7, 70, 20)
    ops = torch.ops.transformer_ext
    packed = _pack(weight)
    out = torch.zeros(7, 70)
    for op, arguments in (
        (ops.gemm_pack_, (packed, weight, False)),
        (ops.gemm_linear_, (out, x, packed, bias, False)),
        (ops.gemm_linear_, (out, x, packed, None, True)),
        (ops.gemm_matmul_, (out, x, weight.t().contiguous(), False)),
    ):
        torch.library.opcheck(op.default, arguments)


@needs_compiled
def test_errors_of_the_raw_ops_name_the_argument():
    x, weight, bias = _tensors(7, 70, 20)
    ops = torch.ops.transformer_ext
    wrong = (ValueError, RuntimeError)  # A RuntimeError from torch 2.15 on.
    packed, out = _pack(weight), torch.zeros(7, 70)
    with pytest.raises(wrong, match="^packed: got shape"):
        ops.gemm_linear_(out, x, packed[:-1], bias, False)
    with pytest.raises(wrong, match="^out: got shape"):
        ops.gemm_pack_(packed[:-1], weight, False)
    with pytest.raises(wrong, match="^bias: got shape"):
        ops.gemm_linear_(out, x, packed, bias[1:], False)
    with pytest.raises(wrong, match="^x: got"):
        ops.gemm_linear_(out, x.double(), packed, bias, False)
    with pytest.raises(wrong, match="^x: got bfloat16"):
        ops.gemm_linear_(out, x.bfloat16(), packed, bias, False)
    with pytest.raises(wrong, match="^b: got a column stride"):
        ops.gemm_matmul_(out, x, weight.t(), False)
    with pytest.raises(wrong, match="^b: got bfloat16"):
        ops.gemm_matmul_(out, x, weight.t().contiguous().bfloat16(), False)
    with pytest.raises(wrong, match="^out: got a column stride"):
        ops.gemm_matmul_(out.t().contiguous().t(), x, weight.t().contiguous(), False)


@needs_compiled
def test_lower_instruction_sets_refuse_bfloat16():
    code = """
import torch, transformer_ext.ops
try:
    torch.ops.transformer_ext.gemm_pack_(torch.empty(256, dtype=torch.bfloat16), torch.ones(1, 1), False)
except (ValueError, RuntimeError) as error:
    assert "cannot multiply" in str(error), error
else:
    raise AssertionError
"""
    environment = {**os.environ, "TRANSFORMER_EXT_ISA": "baseline"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3, 4), torch.zeros(5, 6)), ValueError, r"x: expected \[..., 6\]"),
        ((torch.zeros(3, 4), torch.zeros(4)), ValueError, "weight: expected 2 dimensions"),
        ((torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(4)), ValueError, "bias: expected"),
        ((torch.zeros(3, 4, dtype=torch.int), torch.zeros(5, 4)), TypeError, "x: expected a float"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        linear(*arguments)


def _assert_close(got, expected):
    """But for a rounding of the greatest: the bias is added before it or after."""
    assert max_error(got, expected) <= 2**-7 * expected.detach().abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.5),
        lambda p: torch.optim.Adam(p, lr=0.5, foreach=False),
        lambda p: torch.optim.Adam(p, lr=0.5, foreach=True),
        lambda p: torch.optim.Adam(p, lr=0.5, fused=True),
        lambda p: torch.optim.AdamW(p, lr=0.5, fused=True),
    ],
)
def test_copies_follow_an_optimizer(make, dtype):
    x, weight, bias = _tensors(3, 8, 4, dtype)
    weight, bias = nn.Parameter(weight), nn.Parameter(bias)
    optimizer = make([weight, bias])
    for _ in range(3):
        y = linear(x, weight, bias)
        _assert_close(y, linear_reference(x, weight, bias))
        optimizer.zero_grad()
        y.float().pow(2).sum().backward()
        optimizer.step()
    _assert_close(linear(x, weight, bias), linear_reference(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_follow_every_other_change(dtype):
    x, weight, bias = _tensors(3, 8, 4, dtype)
    weight = nn.Parameter(weight)
    layer = nn.Module()
    layer.weight = weight

    def check():
        with torch.no_grad():
            assert torch.equal(weight_for(weight, dtype), weight.to(dtype))
            grad = torch.ones(3, weight.shape[0], dtype=dtype)
            _assert_close(product(x, weight), x @ weight.to(dtype).t())
            _assert_close(product_input(grad, weight), grad @ weight.to(dtype))

    check()
    with torch.no_grad():
        weight.mul_(2)
    check()
    layer.load_state_dict({"weight": torch.randn(8, 4)})
    check()
    weight.data = torch.randn(8, 4)
    check()
    weight.data = torch.randn(200, 4)
    check()
    with torch.inference_mode():
        check()
        weight.mul_(2)
        check()
    check()
    weight.data.fill_(3.0)
    forget_copies()
    check()


def test_copies_are_made_once_and_die_with_the_weight():
    forget_copies()
    _, weight, _ = _tensors(1, 8, 4)
    with torch.no_grad():
        copy = weight_for(weight, torch.bfloat16)
        assert weight_for(weight, torch.bfloat16) is copy
        assert weight_for(weight, torch.float32) is weight
        product(torch.randn(2, 4), weight)
        product_input(torch.randn(2, 8), weight)
        assert len(_copies._entries) == 1
    del weight
    gc.collect()
    assert not _copies._entries


def test_weight_for_is_differentiable_while_recording():
    weight = torch.randn(3, 4, requires_grad=True)
    weight_for(weight, torch.bfloat16).sum().backward()
    assert torch.equal(weight.grad, torch.ones(3, 4))


def test_a_weight_changed_before_backward_is_an_error():
    x, weight, _ = _tensors(3, 8, 4)
    x.requires_grad_()
    weight.requires_grad_()
    y = linear(x, weight)
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_inference_mode():
    x, weight, bias = _tensors(3, 8, 4)
    expected = linear(x, weight, bias)
    with torch.inference_mode():
        assert torch.equal(linear(x, weight, bias), expected)
        inside = torch.empty_like(weight).copy_(weight)
        for dtype in (torch.float32, torch.bfloat16):
            assert max_error(linear(x.to(dtype), inside, bias), expected) < 0.05
        inside.zero_()
        assert max_error(linear(x.bfloat16(), inside), torch.zeros(3, 8)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_whole(dtype):
    x, weight, bias = _tensors(6, 5, 4, dtype)
    weight.requires_grad_()
    x.requires_grad_()

    def both(function):
        x.grad = weight.grad = None
        y = function(x, weight, bias)
        y.float().pow(2).sum().backward()
        return y.detach(), x.grad, weight.grad

    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for got, expected in zip(both(compiled), both(linear), strict=True):
        assert got.dtype == expected.dtype
        assert max_error(got, expected) <= tolerance * (1 + expected.abs().max().item())


def test_autocast():
    x, weight, bias = _tensors(6, 5, 4)
    weight.requires_grad_()
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x, weight, bias)
        assert y.dtype == nn.functional.linear(x, weight, bias).dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    assert max_error(x.grad, weight.sum(0).expand(6, -1)) < 0.05


def test_choices_name_a_library_for_each_product():
    rows = gemm_choices()
    assert {(r["product"], r["dtype"]) for r in rows} == {
        (p, d) for p in ("forward", "input", "weight") for d in ("float32", "bfloat16")
    }
    assert {r["library"] for r in rows} <= {"torch", "transformer_ext"}
    assert all(r["reason"] for r in rows)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_column_sums_on_a_gpu(dtype):
    column_sum = torch.ops.transformer_ext.column_sum_
    for rows, columns in ((0, 5), (3, 1), (17, 71), (3001, 2080)):
        x = torch.randn(rows, columns + 8).to(dtype)[:, :columns]
        expected = x.double().sum(0)
        out = torch.full((columns,), torch.nan, device="cuda")
        column_sum(out, x.cuda(), False)
        torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-5, atol=1e-3)
        again = torch.zeros_like(out)
        column_sum(again, x.cuda(), True)
        assert torch.equal(again, out)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_gradients_on_a_gpu_are_not_rounded(dtype):
    generator = torch.Generator().manual_seed(0)
    grad, x = (
        torch.randn(200, columns, generator=generator).to(dtype).cuda() for columns in (33, 40)
    )
    exact = grad.double().t() @ x.double()
    peer = (grad.float().cpu().t() @ x.float().cpu()).cuda()
    out = torch.full_like(peer, torch.nan)
    product_weight(grad, x, out=out)
    assert_as_precise(out, exact, peer, factor=16.0, roundings=16.0)
    assert torch.equal(product_weight(grad, x), out)
    product_weight(grad, x, out=out, accumulate=True)
    assert_as_precise(out, 2 * exact, 2 * peer, factor=16.0, roundings=16.0)
