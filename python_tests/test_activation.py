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

from transformer_ext.ops.activation import KINDS, activation, activation_reference, is_gated

DTYPES = (torch.float32, torch.bfloat16)
RNG = torch.tensor([-5, 3, 1])


def case(kind, shape, dtype, spread=3.0):
    """x, bias and the gradient of the result, which has the given shape."""
    generator = torch.Generator().manual_seed(shape[-1])
    columns = shape[-1] * (2 if is_gated(kind) else 1)
    x = (torch.randn(*shape[:-1], columns, generator=generator) * spread).to(dtype)
    bias = torch.randn(columns, generator=generator)
    return x, bias, torch.randn(shape, generator=generator).to(dtype)


def run(face, kind, x, bias, grad, **options):
    inputs = [t.detach().requires_grad_() for t in (x, bias) if t is not None]
    y = face(*inputs, kind=kind, **options)
    return y.detach(), *torch.autograd.grad(y, inputs, grad)


@needs_compiled
@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(37, 1), (29, 7), (37, 64), (2, 3, 65), (99, 517)])
def test_precision_against_float64(shape, p, kind, device, dtype):
    x, bias, grad = case(kind, shape, dtype)
    options = {"dropout_p": p, "rng": RNG, "site": 7}
    for b in (bias, None):
        wide_bias = None if b is None else b.double()
        exact = run(activation_reference, kind, x.double(), wide_bias, grad.double(), **options)
        peer = run(activation_reference, kind, x, b, grad, **options)
        with set_backend("compiled"):
            got = run(activation, kind, *moved((x, b, grad), device), **moved(options, device))
        assert_all_as_precise(moved(got, "cpu"), exact, peer)


@needs_gpu
@pytest.mark.parametrize("kind", ("relu", "swiglu"))
def test_gradients_on_a_gpu_are_the_same_bits_each_time_and_in_a_graph(kind):
    x, bias, grad = moved(case(kind, (3001, 515), torch.bfloat16), "cuda")
    rng = RNG.cuda()
    assert_graph_safe(
        lambda: run(activation, kind, x, bias, grad, dropout_p=0.1, rng=rng, site=2), rng
    )


@needs_compiled
@pytest.mark.parametrize("kind", KINDS[:4])
def test_precision_over_the_whole_range(kind):
    x = torch.cat([torch.linspace(-30, 30, 60001), torch.logspace(-30, 18, 601)])
    x = torch.cat([x, -x])
    grad = torch.ones_like(x)
    exact = run(activation_reference, kind, x.double(), None, grad.double())
    with set_backend("compiled"):
        got = run(activation, kind, x, None, grad)
    for ours, true in zip(got, exact, strict=True):
        assert (ours - true).abs().div(true.abs().clamp(min=1)).max() < 6e-7


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_stays_where_it_is(kind, backend):
    x, bias, grad = case(kind, (5, 70), torch.float32)
    dirty = x.clone()
    dirty[2, 69] = torch.nan
    with set_backend(backend):
        clean = run(activation, kind, x, bias, grad)
        got = run(activation, kind, dirty, bias, grad)
    assert got[0][2, 69].isnan() and got[0].isnan().sum() == 1
    others = ~got[0].isnan()
    assert torch.equal(got[0][others], clean[0][others])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_empty_and_strided_input(kind, backend):
    with set_backend(backend):
        for shape in ((0, 5), (2, 0, 5), (3, 0)):
            x, bias, grad = case(kind, shape, torch.float32)
            y, grad_x, grad_bias = run(activation, kind, x, bias, grad)
            assert y.shape == shape and grad_x.shape == x.shape
            assert grad_bias.shape == bias.shape and (grad_bias == 0).all()
        x, bias, grad = case(kind, (4, 6, 8), torch.float32)
        x, grad = x.transpose(0, 1), grad.transpose(0, 1)
        options = {"dropout_p": 0.5, "rng": RNG}
        strided = run(activation, kind, x, bias, grad, **options)
        plain = run(activation, kind, x.contiguous(), bias, grad.contiguous(), **options)
        for a, b in zip(strided, plain, strict=True):
            torch.testing.assert_close(a, b)


@needs_compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ("relu", "swiglu"))
def test_same_bits_for_any_thread_count(kind, dtype):
    x, bias, grad = case(kind, (700, 515), dtype)
    results = []
    for count in (1, 2, 4):
        with threads(count), set_backend("compiled"):
            results.append(run(activation, kind, x, bias, grad, dropout_p=0.1, rng=RNG, site=2))
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert torch.equal(a, b)


@needs_compiled
def test_relu_keeps_its_output_alone():
    x, bias, grad = case("relu", (5, 70), torch.bfloat16)
    with set_backend("compiled"):
        y = activation(x.requires_grad_(), bias, kind="relu", dropout_p=0.3, rng=RNG)
        kept = [t.data_ptr() for t in y.grad_fn.saved_tensors if t is not None]
        assert y.data_ptr() in kept and x.data_ptr() not in kept
        changed = y * 1
        y.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            changed.backward(grad)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_gradient(kind):
    x, bias, _ = case(kind, (3, 5), torch.float64)
    assert torch.autograd.gradcheck(
        lambda *a: activation_reference(*a, kind=kind, dropout_p=0.3, rng=RNG),
        (x.requires_grad_(), bias.double().requires_grad_()),
    )


@needs_compiled
@pytest.mark.parametrize("kind", ("relu", "gelu", "geglu"))
def test_raw_ops_are_sound(kind):
    ops = torch.ops.transformer_ext
    x, bias, grad = case(kind, (3, 4, 9), torch.float32)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for b, p, rng in ((bias, 0.3, RNG), (None, 0.0, None)):
        rest = (KINDS.index(kind), p, rng, 3)
        torch.library.opcheck(ops.activation_forward.default, (x, b, *rest), test_utils=checks)
        torch.library.opcheck(
            ops.activation_backward.default, (grad, x, b, *rest), test_utils=checks
        )


@needs_compiled
@pytest.mark.parametrize("kind", ("relu", "swiglu"))
def test_compiles_to_one_graph(kind):
    x, bias, _ = case(kind, (4, 40), torch.float32)
    inputs = [x.requires_grad_(), bias.requires_grad_()]

    def loss(x, bias, rng):
        y = activation(x, bias, kind=kind, dropout_p=0.1, rng=rng, site=1)
        return (y * 2).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*inputs, RNG), inputs)
    got = torch.autograd.grad(compiled(*inputs, RNG), inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.zeros(2, 3),), {"kind": "mish"}, "kind: expected one of relu, gelu"),
        ((torch.zeros(2, 3),), {"kind": "reglu"}, "reglu needs an even number of columns, got 3"),
        ((torch.zeros(2, 3), torch.zeros(2)), {}, r"bias: expected shape \[3\]"),
        ((torch.zeros(()),), {}, "x: expected at least one dimension"),
        ((torch.zeros(2, 3),), {"dropout_p": 2.0, "rng": RNG}, "from 0 to 1, got 2.0"),
    ],
)
def test_wrong_arguments_are_named(arguments, options, message, backend):
    with set_backend(backend), pytest.raises(ValueError, match=message):
        activation(*arguments, **options)
