import pytest
import torch
from kernel_testing import (
    BACKENDS,
    PLACES,
    assert_all_as_precise,
    assert_graph_safe,
    moved,
    needs_compiled,
    needs_gpu,
    set_backend,
    threads,
)

from transformer_ext.ops.residual_norm import (
    norm,
    norm_reference,
    residual_dropout,
    residual_dropout_reference,
    residual_norm,
    residual_norm_reference,
)

DTYPES = (torch.float32, torch.bfloat16)
KINDS = ("layer", "rms")
RNG = torch.tensor([-5, 3, 1])


def case(shape, dtype, seed=0, residual=True, affine=True):
    """x, residual, weight, bias and the gradients of sum and normed."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator)

    x = (normal(*shape) * 2 + 3).to(dtype)
    return (
        (
            x,
            normal(*shape).to(dtype) if residual else None,
            normal(shape[-1]) if affine else None,
            normal(shape[-1]) if affine else None,
        ),
        (normal(*shape).to(dtype), normal(*shape).to(dtype)),
    )


def run(face, inputs, grads, **options):
    """Outputs, then gradients of the inputs that are given."""
    inputs = [None if x is None else x.detach().requires_grad_() for x in inputs]
    outputs = face(*inputs, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None]
    got = torch.autograd.grad(
        [y for y, _ in pairs],
        [x for x in inputs if x is not None],
        [g for _, g in pairs],
        allow_unused=True,
    )
    return [y.detach() for y in outputs], list(got)


def wide(tensors):
    return tuple(None if x is None else x.double() for x in tensors)


def check_precision(face, twin, inputs, grads, device="cpu", **options):
    exact = sum(run(twin, wide(inputs), wide(grads), **options), [])
    peer = sum(run(twin, inputs, grads, **options), [])
    with set_backend("compiled"):
        got = sum(run(face, *moved((inputs, grads), device), **moved(options, device)), [])
    assert_all_as_precise(moved(got, "cpu"), exact, peer)


@needs_gpu
@pytest.mark.parametrize("columns", [512, 1500])
def test_results_on_a_gpu_are_the_same_bits_each_time_and_in_a_graph(columns):
    inputs, grads = moved(case((3001, columns), torch.bfloat16), "cuda")
    rng = RNG.cuda()
    assert_graph_safe(
        lambda: sum(run(residual_norm, inputs, grads, dropout_p=0.1, rng=rng, site=2), []), rng
    )


@needs_compiled
@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(37, 1), (29, 7), (2, 3, 65), (203, 512), (2, 2051)])
def test_precision_against_float64(shape, p, kind, device, dtype):
    options = {"kind": kind, "dropout_p": p, "rng": RNG, "site": 7, "device": device}
    for residual in (True, False):
        for affine in (True, False):
            inputs, grads = case(shape, dtype, shape[-1], residual, affine)
            check_precision(residual_norm, residual_norm_reference, inputs, grads, **options)


@needs_compiled
@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(9,), (4, 64), (67, 300)])
def test_norm_alone_precision(shape, kind, device, dtype):
    (x, _, weight, bias), (grad, _) = case(shape, dtype)
    check_precision(norm, norm_reference, (x, weight, bias), (grad,), kind=kind, device=device)


@needs_compiled
@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("residual", [True, False])
def test_residual_dropout_precision(residual, device, dtype):
    (x, other, _, _), (grad, _) = case((67, 301), dtype, residual=residual)
    options = {"dropout_p": 0.2, "rng": RNG, "site": 3, "device": device}
    check_precision(residual_dropout, residual_dropout_reference, (x, other), (grad,), **options)


@needs_compiled
@pytest.mark.parametrize("kind", KINDS)
def test_a_great_mean_costs_no_precision(kind):
    inputs, grads = case((9, 500), torch.float32)
    check_precision(
        residual_norm, residual_norm_reference, (inputs[0] + 1000, *inputs[1:]), grads, kind=kind
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("which", [0, 1])
def test_only_one_of_the_results_is_used(which, p, kind, backend):
    inputs, grads = case((5, 33), torch.float32)
    grads = tuple(g if i == which else None for i, g in enumerate(grads))
    options = {"kind": kind, "dropout_p": p, "rng": RNG, "site": 1}
    _, expected = run(residual_norm_reference, wide(inputs), wide(grads), **options)
    with set_backend(backend):
        _, got = run(residual_norm, inputs, grads, **options)
    for ours, true in zip(got, expected, strict=True):
        if true is None or ours is None:
            assert ours is None or (ours == 0).all()
        else:
            torch.testing.assert_close(ours.double(), true, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needed", range(4))
def test_only_one_of_the_gradients_is_wanted(needed, backend):
    inputs, grads = case((5, 33), torch.float32)
    options = {"dropout_p": 0.3, "rng": RNG}
    expected = run(residual_norm_reference, inputs, grads, **options)[1][needed]
    inputs = [x.detach().requires_grad_(i == needed) for i, x in enumerate(inputs)]
    with set_backend(backend):
        outputs = residual_norm(*inputs, **options)
    pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if y.requires_grad]
    (got,) = torch.autograd.grad([y for y, _ in pairs], inputs[needed], [g for _, g in pairs])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_is_that_of_torch(backend):
    (x, _, weight, bias), _ = case((6, 40), torch.float32)
    functional = torch.nn.functional
    with set_backend(backend):
        torch.testing.assert_close(
            norm(x, weight, bias, eps=1e-3), functional.layer_norm(x, (40,), weight, bias, 1e-3)
        )
        torch.testing.assert_close(
            norm(x, weight, kind="rms", eps=1e-3), functional.rms_norm(x, (40,), weight, 1e-3)
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_stays_in_its_row(kind, backend):
    (x, residual, weight, bias), grads = case((5, 70), torch.float32)
    dirty = x.clone()
    dirty[2, 69] = torch.nan
    with set_backend(backend):
        clean = run(residual_norm, (x, residual, weight, bias), grads, kind=kind)
        got = run(residual_norm, (dirty, residual, weight, bias), grads, kind=kind)
    rows = [0, 1, 3, 4]
    for a, b in zip([*clean[0], *clean[1][:2]], [*got[0], *got[1][:2]], strict=True):
        assert torch.equal(a[rows], b[rows])
    assert got[0][1][2].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_row_is_no_division_by_zero(kind, backend):
    with set_backend(backend):
        outputs, grads = run(
            norm, (torch.zeros(2, 10), None, None), (torch.ones(2, 10),), kind=kind
        )
    assert (outputs[0] == 0).all() and grads[0].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_and_strided_input(backend):
    with set_backend(backend):
        for shape in ((0, 5), (2, 0, 5)):
            inputs, grads = case(shape, torch.float32)
            outputs, got = run(residual_norm, inputs, grads)
            assert outputs[0].shape == outputs[1].shape == got[0].shape == shape
            assert (got[2] == 0).all() and (got[3] == 0).all() and got[2].shape == (5,)
        inputs, grads = case((4, 6, 8), torch.float32)
        inputs = (inputs[0].transpose(0, 1), inputs[1].transpose(0, 1), *inputs[2:])
        grads = tuple(g.transpose(0, 1) for g in grads)
        plain = [
            tuple(t.contiguous() for t in inputs),
            tuple(g.contiguous() for g in grads),
        ]
        options = {"dropout_p": 0.5, "rng": RNG}
        for a, b in zip(
            sum(run(residual_norm, inputs, grads, **options), []),
            sum(run(residual_norm, *plain, **options), []),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_that_differ_are_promoted(backend):
    # As under autocast: a bfloat16 sublayer on a float32 residual stream.
    (x, residual, weight, bias), _ = case((4, 32), torch.float32)
    with set_backend(backend):
        total, normed = residual_norm(x.bfloat16(), residual, weight, bias)
        expected = residual_norm_reference(x.bfloat16().float(), residual, weight, bias)
        dropped = residual_dropout(x.bfloat16(), residual, dropout_p=0.5, rng=RNG)
    assert total.dtype == normed.dtype == dropped.dtype == torch.float32
    torch.testing.assert_close((total, normed), expected)


@needs_compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_thread_count(dtype):
    inputs, grads = case((700, 515), dtype)
    results = []
    for count in (1, 2, 4):
        with threads(count), set_backend("compiled"):
            results.append(
                sum(run(residual_norm, inputs, grads, dropout_p=0.1, rng=RNG, site=2), [])
            )
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_gradient(kind):
    inputs, _ = case((3, 5), torch.float64)
    inputs = [x.double().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(
        lambda *a: residual_norm_reference(*a, kind=kind, dropout_p=0.3, rng=RNG), inputs
    )


@needs_compiled
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("rms", [False, True])
def test_raw_ops_are_sound(rms, p):
    ops = torch.ops.transformer_ext
    (x, residual, weight, bias), (grad_sum, grad) = case((3, 4, 9), torch.float32)
    rng = RNG if p else None
    forward = (weight, bias, rms, 1e-5, p, rng, 3)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for other in (residual, None):
        torch.library.opcheck(
            ops.residual_norm_forward.default, (x, other, *forward), test_utils=checks
        )
    total, _, mean, rstd = ops.residual_norm_forward(x, residual, *forward)
    for w, s in ((weight, grad_sum), (None, None)):
        torch.library.opcheck(
            ops.residual_norm_backward.default,
            (grad, s, total, mean, rstd, w, w is not None, rms, p, rng, 3),
            test_utils=checks,
        )
    torch.library.opcheck(
        ops.residual_dropout.default, (x, residual, 0.3, RNG, 3), test_utils=checks
    )


@needs_compiled
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compiles_to_one_graph(p):
    inputs, _ = case((4, 40), torch.float32)
    inputs = [x.requires_grad_() for x in inputs]

    def loss(x, residual, weight, bias, rng):
        total, normed = residual_norm(x, residual, weight, bias, dropout_p=p, rng=rng, site=1)
        last = residual_dropout(normed, total, dropout_p=p, rng=rng, site=2)
        return (norm(last, weight, bias, "rms") * 2).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*inputs, RNG), inputs)
    got = torch.autograd.grad(compiled(*inputs, RNG), inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.zeros(2, 3), torch.zeros(3, 3)), {}, r"residual: expected the shape of x, \[2, 3"),
        ((torch.zeros(2, 3), None, torch.ones(2)), {}, r"weight: expected shape \[3\]"),
        ((torch.zeros(2, 3), None, None, torch.ones(4)), {}, r"bias: expected shape \[3\]"),
        ((torch.zeros(2, 3),), {"kind": "batch"}, "kind: expected one of layer, rms, got 'batch'"),
        ((torch.zeros(2, 3),), {"eps": -1.0}, "eps: expected a finite number from 0, got -1"),
        (
            (torch.zeros(2, 3),),
            {"eps": float("inf")},
            "eps: expected a finite number from 0, got inf",
        ),
        ((torch.zeros(2, 3),), {"eps": "a"}, "eps: expected a finite number from 0, got 'a'"),
        (([1.0],), {}, "x: expected a tensor, got list"),
        ((torch.zeros(2, 3), [1.0]), {}, "residual: expected a tensor, got list"),
        ((torch.zeros(2, 3).long(),), {}, "x: expected a floating-point tensor, got torch.int64"),
        (
            (torch.zeros(2, 3), None, torch.zeros(3).double()),
            {},
            "weight: expected float32 for x of torch.float32, got torch.float64",
        ),
        ((torch.zeros(2, 3),), {"dropout_p": 2.0, "rng": RNG}, "from 0 to 1, got 2.0"),
    ],
)
def test_wrong_arguments_are_named(arguments, options, message, backend):
    with set_backend(backend), pytest.raises((TypeError, ValueError), match=message):
        residual_norm(*arguments, **options)
