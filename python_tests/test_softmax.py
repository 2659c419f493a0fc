import pytest
import torch
from kernel_testing import (
    BACKENDS,
    assert_as_precise,
    assert_graph_safe,
    needs_compiled,
    needs_gpu,
    set_backend,
    threads,
)

from transformer_ext.ops.masks import causal_mask, key_padding_mask
from transformer_ext.ops.softmax import (
    masked_log_softmax,
    masked_log_softmax_reference,
    masked_softmax,
    masked_softmax_reference,
)

FACES = {
    "softmax": (masked_softmax, masked_softmax_reference, torch.softmax),
    "log_softmax": (masked_log_softmax, masked_log_softmax_reference, torch.log_softmax),
}
DTYPES = (torch.float32, torch.bfloat16)


def run(face, x, grad, *masks, **options):
    x = x.detach().requires_grad_()
    y = face(x, *masks, **options)
    # A gradient of -inf * 0 is what a loss gives that multiplies log-probabilities by a mask.
    (grad_x,) = torch.autograd.grad(y, x, grad)
    return y.detach(), grad_x


@needs_compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FACES)
@pytest.mark.parametrize(
    "shape", [(1,), (7,), (3, 1), (5, 16), (2, 3, 17), (2, 2, 5, 33), (3, 1, 9, 130), (2, 2051)]
)
def test_precision_against_float64(name, shape, dtype):
    face, twin, composition = FACES[name]
    generator = torch.Generator().manual_seed(len(shape) * 1000 + shape[-1])
    x = (torch.randn(shape, generator=generator) * 5).to(dtype)
    grad = torch.randn(shape, generator=generator).to(dtype)
    keep = torch.rand(shape, generator=generator) < 0.7
    keep[..., 0] = True
    exact = run(twin, x.double(), grad.double(), keep)
    with set_backend("compiled"):
        got = run(face, x, grad, keep)
    plain = run(
        lambda x: torch.where(keep, composition(x.masked_fill(~keep, -torch.inf), -1), exact[0]).to(
            dtype
        ),
        x,
        grad,
    )
    for ours, true, peer in zip(got, exact, plain, strict=True):
        assert_as_precise(ours, true, peer)


@needs_compiled
@pytest.mark.parametrize("name", FACES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_typed_masks_equal_the_dense_mask(name, dtype):
    face = FACES[name][0]
    x = torch.randn(3, 2, 6, 21).to(dtype)
    grad = torch.randn(3, 2, 6, 21).to(dtype)
    lengths = torch.tensor([0, 21, 5], dtype=torch.int32)
    square = torch.ones(6, 21, dtype=torch.bool).tril()
    dense = (key_padding_mask(lengths, 21) & square).expand(x.shape).contiguous()
    with set_backend("compiled"):
        expected = run(face, x, grad, dense)
        for masks, options in (
            ((None,), {"key_lengths": lengths, "causal": True}),
            ((key_padding_mask(lengths, 21),), {"causal": True}),
            ((square,), {"key_lengths": lengths}),
            ((dense.transpose(-1, -2).contiguous().transpose(-1, -2),), {}),
        ):
            for a, b in zip(run(face, x, grad, *masks, **options), expected, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FACES)
def test_a_fully_masked_row_is_exactly_zero_forward_and_backward(name, dtype, backend):
    face = FACES[name][0]
    x = torch.randn(2, 3, 40).to(dtype)
    x[1, 2] = -torch.inf  # masked by an additive mask
    grad = torch.randn(2, 3, 40).to(dtype)
    keep = torch.ones(2, 3, 1, dtype=torch.bool)
    keep[0, 1] = False
    with set_backend(backend):
        y, grad_x = run(face, x, grad, keep)
        alone = run(face, torch.randn(1, 1).to(dtype), grad[0, 0, :1].view(1, 1), keep[0, 1:2])
    for row in ((0, 1), (1, 2)):
        assert torch.equal(y[row], torch.zeros(40, dtype=dtype))
        assert torch.equal(grad_x[row], torch.zeros(40, dtype=dtype))
    assert not y.isnan().any() and not grad_x.isnan().any()
    assert alone[0].item() == 0 and alone[1].item() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FACES)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 3e38])
def test_what_stands_in_a_masked_slot_has_no_effect(name, dtype, backend, poison):
    face = FACES[name][0]
    keep = torch.rand(4, 5, 50) < 0.5
    keep[0, 0] = False
    x, grad = (torch.randn(4, 5, 50).to(dtype) for _ in range(2))
    with set_backend(backend):
        clean = run(face, x.masked_fill(~keep, 0), grad.masked_fill(~keep, 0), keep)
        dirty = run(face, x.masked_fill(~keep, poison), grad.masked_fill(~keep, poison), keep)
    assert torch.equal(clean[0], dirty[0])
    assert torch.equal(clean[1], dirty[1])
    assert not dirty[1].isnan().any()
    assert (dirty[1][~keep] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FACES)
def test_a_nan_that_is_kept_is_seen(name, backend):
    x = torch.zeros(3, 37)
    x[1, 20] = torch.nan
    x[2] = torch.nan
    keep = torch.ones(3, 37, dtype=torch.bool)
    keep[2, 1:] = False
    with set_backend(backend):
        y = FACES[name][0](x, keep)
    assert not y[0].isnan().any()
    assert y[1, 20].isnan() and y[1, 0].isnan()
    assert y[2, 0].isnan() and not y[2, 1:].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_great_and_small_scores_do_not_overflow(backend, dtype):
    x = torch.tensor([[3e38, 3e38, -3e38], [-3e38, -3e38, -3e38], [1e4, 0.0, -1e4]]).to(dtype)
    with set_backend(backend):
        y = masked_softmax(x)
        log = masked_log_softmax(x)
    expected = torch.tensor([[0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(y.float(), expected, rtol=4e-3, atol=0)
    assert log[0, 0].float().item() == pytest.approx(-0.6931, rel=4e-3) and log[2, 0] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_and_strided_input(backend):
    with set_backend(backend):
        for shape in ((0, 5), (3, 0), (2, 0, 4), (0,)):
            y, grad_x = run(masked_softmax, torch.randn(shape), torch.randn(shape))
            assert y.shape == grad_x.shape == shape
        x = torch.randn(6, 4, 8)
        strided = x.transpose(0, 2)
        grad = torch.randn(8, 4, 6)
        for a, b in zip(
            run(masked_softmax, strided, grad.transpose(0, 1).contiguous().transpose(0, 1)),
            run(masked_softmax, strided.contiguous(), grad),
            strict=True,
        ):
            assert torch.equal(a, b)


@needs_compiled
@pytest.mark.parametrize("name", FACES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_thread_count(name, dtype):
    x, grad = (torch.randn(64, 9, 333).to(dtype) for _ in range(2))
    keep = torch.rand(64, 1, 333) < 0.8
    results = []
    for count in (1, 2, 4):
        with threads(count), set_backend("compiled"):
            results.append(run(FACES[name][0], x, grad, keep))
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0]) and torch.equal(result[1], results[0][1])


@pytest.mark.parametrize("name", FACES)
def test_reference_gradient(name):
    keep = causal_mask(4).clone()
    keep[2] = False
    x = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    twin = FACES[name][1]
    assert torch.autograd.gradcheck(
        lambda x: torch.where(keep, twin(x, keep), 0.0), (x,), check_undefined_grad=False
    )


@needs_compiled
@pytest.mark.parametrize("log", [False, True])
def test_raw_ops_are_sound(log):
    x = torch.randn(2, 3, 9)
    keep = (torch.rand(3, 9) < 0.5).expand(2, 3, 9)
    ops = torch.ops.transformer_ext
    torch.library.opcheck(ops.masked_softmax.default, (x, keep, torch.tensor([4, 9]), True, log))
    torch.library.opcheck(ops.masked_softmax.default, (x.bfloat16(), None, None, False, log))
    y = ops.masked_softmax(x, keep, None, False, log)
    torch.library.opcheck(ops.masked_softmax_backward.default, (torch.randn_like(x), y, log))


@needs_compiled
def test_compiles_to_one_graph():
    x = torch.randn(2, 3, 9, requires_grad=True)
    keep = torch.rand(3, 9) < 0.5

    def loss(x):
        return (masked_softmax(x, keep) * 3 + x).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(loss(x), x)
    (got,) = torch.autograd.grad(compiled(x), x)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.zeros(2, 3), torch.zeros(2, 3)), {}, TypeError, "mask: expected bool"),
        ((torch.zeros(2, 3), torch.ones(4, 3).bool()), {}, ValueError, r"\[4, 3\] does not"),
        ((torch.zeros(3), torch.ones(1, 3).bool()), {}, ValueError, r"\[1, 3\] does not"),
        ((torch.zeros(3),), {"causal": True}, ValueError, "at least 2 dimensions"),
        ((torch.zeros(2, 3),), {"key_lengths": torch.ones(3).int()}, ValueError, "key_lengths"),
        ((torch.zeros(2, 3),), {"key_lengths": torch.tensor([7, 1])}, IndexError, "got 7, .* to 3"),
        ((torch.zeros(2, 3).int(),), {}, TypeError, "x: expected a floating-point"),
    ],
)
def test_wrong_arguments_are_named(arguments, options, error, message, backend):
    for face, _, _ in FACES.values():
        with set_backend(backend), pytest.raises(error, match=message):
            face(*arguments, **options)


@needs_gpu
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("name", FACES)
@pytest.mark.parametrize("columns", [1, 5, 64, 100, 129, 500, 1000, 1023, 1024, 1028, 5001])
def test_cuda_kernel(name, columns, dtype):
    face, twin, _ = FACES[name]
    generator = torch.Generator().manual_seed(columns)
    x = (torch.randn(3, 2, 7, columns, generator=generator) * 5).to(dtype)
    grad = torch.randn(3, 2, 7, columns, generator=generator).to(dtype)
    keep = torch.rand(3, 1, 7, columns, generator=generator) < 0.7
    keep[0, :, 1] = False
    x[1, :, :, 0] = torch.nan
    grad[1, :, :, 0] = torch.nan
    keep[1, :, :, 0] = False
    lengths = torch.tensor([columns, columns // 2 + 1, 0])
    for masks, options in (
        ((keep,), {}),
        ((keep,), {"key_lengths": lengths, "causal": True}),
        ((keep[..., :1],), {"key_lengths": lengths}),
    ):
        expected = run(twin, x.double(), grad.double(), *masks, **options)
        peer = run(twin, x, grad, *masks, **options)
        with set_backend("compiled"):
            got = run(
                face,
                x.cuda(),
                grad.cuda(),
                *(mask.cuda() for mask in masks),
                **{k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in options.items()},
            )
        for ours, true, plain in zip(got, expected, peer, strict=True):
            # The twin keeps the float32 output for its backward, the kernel the rounded one.
            assert_as_precise(ours.cpu(), true, plain, factor=4 if dtype != torch.float32 else 2)


@needs_gpu
@pytest.mark.parametrize("name", FACES)
@pytest.mark.parametrize("columns", [100, 5001])
def test_results_on_a_gpu_are_the_same_bits_each_time_and_in_a_graph(name, columns):
    generator = torch.Generator().manual_seed(columns)
    x, grad, chance = (
        torch.randn(3, 2, 257, columns, generator=generator).bfloat16().cuda() for _ in range(3)
    )
    options = {"key_lengths": torch.tensor([columns, 7, 0]).cuda(), "causal": True}
    assert_graph_safe(lambda: run(FACES[name][0], x, grad, chance > -0.5, **options))
