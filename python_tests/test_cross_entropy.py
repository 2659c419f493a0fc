import pytest
import torch
from kernel_testing import (
    BACKENDS,
    assert_all_as_precise,
    assert_as_precise,
    needs_compiled,
    needs_gpu,
    set_backend,
    threads,
)
from torch import nn
from torch.nn import functional

from transformer_ext.ops import cross_entropy as subject
from transformer_ext.ops.cross_entropy import (
    LossOutput,
    label_smoothing_loss,
    linear_cross_entropy,
)

DTYPES = (torch.float32, torch.bfloat16)
IGNORED = -100


def problem(tokens, vocabulary, features, *, bias=True, ignored=0.2, seed=0):
    """x, weight, bias, targets in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, features, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, features, generator=generator, dtype=torch.float64) * 0.3
    offset = torch.randn(vocabulary, generator=generator, dtype=torch.float64) if bias else None
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < ignored] = IGNORED
    return x, weight, offset, targets


def leaves(*tensors, dtypes):
    return [
        None if t is None else t.to(dtype).requires_grad_()
        for t, dtype in zip(tensors, dtypes, strict=True)
    ]


@pytest.fixture(params=["as on a CPU", "as on a GPU"])
def way(request, monkeypatch):
    """The second: nothing is read by the host, and the divisor waits for the backward pass."""
    if request.param == "as on a GPU":
        monkeypatch.setattr(subject, "_host_may_wait", lambda _: False)
        monkeypatch.setattr(subject, "_split_divisor", lambda divisor, _: (None, divisor))


def gradients(loss, inputs):
    return torch.autograd.grad(loss, [t for t in inputs if t is not None])


def torch_loss(x, weight, bias, targets, label_smoothing, compute=None):
    """nn.Linear and nn.CrossEntropyLoss as their users write them."""
    compute = compute or x.dtype
    logits = functional.linear(x, weight.to(compute), None if bias is None else bias.to(compute))
    criterion = nn.CrossEntropyLoss(
        label_smoothing=label_smoothing, ignore_index=IGNORED, reduction="sum"
    )
    return criterion(logits.float() if compute != torch.float64 else logits, targets)


@needs_compiled
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "vocabulary", "features", "bias", "rows"),
    [
        (1, 1, 1, True, 1),
        (3, 2, 5, False, 3),
        (40, 97, 24, True, 40),
        (65, 1031, 16, False, 65),
        (100, 203, 40, True, 16),
    ],
)
def test_precision_against_float64(
    tokens, vocabulary, features, bias, rows, dtype, label_smoothing, way, monkeypatch
):
    monkeypatch.setattr(subject, "_chunk_rows", lambda *_: rows)
    x, weight, offset, targets = problem(tokens, vocabulary, features, bias=bias)
    targets[0] = 0
    x = x.to(dtype).double()
    exact_inputs = leaves(x, weight.float(), offset, dtypes=(torch.float64,) * 3)
    ours_inputs = leaves(x, weight, offset, dtypes=(dtype, torch.float32, torch.float32))
    peer_inputs = leaves(x, weight, offset, dtypes=(dtype, torch.float32, torch.float32))
    exact = torch_loss(*exact_inputs, targets, label_smoothing)
    peer = torch_loss(*peer_inputs, targets, label_smoothing)
    with set_backend("compiled"):
        ours = linear_cross_entropy(
            ours_inputs[0],
            ours_inputs[1],
            targets,
            bias=ours_inputs[2],
            label_smoothing=label_smoothing,
        ).loss
    assert_as_precise(ours, exact, peer)
    for got, true, plain in zip(
        gradients(ours, ours_inputs),
        gradients(exact, exact_inputs),
        gradients(peer, peer_inputs),
        strict=True,
    ):
        assert_as_precise(got, true, plain)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_linear_and_cross_entropy_loss(label_smoothing, bias, backend):
    inputs = problem(50, 301, 32, bias=bias)
    targets = inputs[3]
    ours_inputs = leaves(*inputs[:3], dtypes=(torch.float32,) * 3)
    torch_inputs = leaves(*inputs[:3], dtypes=(torch.float32,) * 3)
    tokens = int((targets != IGNORED).sum())
    with set_backend(backend):
        out = linear_cross_entropy(
            ours_inputs[0],
            ours_inputs[1],
            targets,
            bias=ours_inputs[2],
            label_smoothing=label_smoothing,
            normalizer=tokens,
        )
    expected = torch_loss(*torch_inputs, targets, label_smoothing) / tokens
    torch.testing.assert_close(out.loss, expected)
    for got, want in zip(
        gradients(out.loss, ours_inputs), gradients(expected, torch_inputs), strict=True
    ):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)

    logits = functional.linear(*(None if t is None else t.detach() for t in torch_inputs))
    counted = targets != IGNORED
    assert isinstance(out, LossOutput)
    assert out.tokens.item() == tokens
    assert out.correct.item() == int((logits.argmax(-1) == targets)[counted].sum())
    torch.testing.assert_close(
        out.nll_sum, functional.cross_entropy(logits, targets, reduction="sum")
    )
    assert not (out.nll_sum.requires_grad or out.correct.requires_grad or out.tokens.requires_grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_given_logits(backend, dtype):
    logits = torch.randn(4, 6, 77).to(dtype)
    targets = torch.randint(0, 77, (4, 6))
    targets[1, 2:] = 5
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    with set_backend(backend):
        out = label_smoothing_loss(ours, targets, ignore_index=5, normalizer=3.0)
    expected = (
        functional.cross_entropy(
            theirs.flatten(0, 1).float(),
            targets.flatten(),
            ignore_index=5,
            label_smoothing=0.1,
            reduction="sum",
        )
        / 3
    )
    (out.loss * 2).backward()
    (expected * 2).backward()
    assert torch.equal(ours.detach(), logits), "the caller's logits were written to"
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert out.tokens.item() == int((targets != 5).sum())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_normalizer_as_number_as_tensor_and_by_hand(backend, dtype):
    inputs = problem(20, 50, 8)
    results = []
    with set_backend(backend):
        for normalizer in (7.5, torch.tensor(7.5), torch.tensor([7.5], dtype=torch.float64), None):
            x, weight, bias = leaves(*inputs[:3], dtypes=(dtype, torch.float32, torch.float32))
            out = linear_cross_entropy(x, weight, inputs[3], bias=bias, normalizer=normalizer)
            loss = out.loss if normalizer is not None else out.loss / 7.5
            results.append(
                (loss.detach(), *(g.float() for g in gradients(loss, (x, weight, bias))))
            )
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            tolerance = 1e-6 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulated_batches_give_the_gradient_of_the_whole(backend):
    x, weight, _, targets = problem(30, 64, 12, ignored=0.5)
    tokens = int((targets != IGNORED).sum())
    whole = leaves(x, weight, dtypes=(torch.float32,) * 2)
    parts = leaves(x, weight, dtypes=(torch.float32,) * 2)
    with set_backend(backend):
        linear_cross_entropy(*whole, targets, normalizer=tokens).loss.backward()
        for rows in (slice(0, 4), slice(4, 21), slice(21, 30)):
            linear_cross_entropy(
                parts[0][rows], parts[1], targets[rows], normalizer=tokens
            ).loss.backward()
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_counted_gives_zero_loss_and_gradients(backend, dtype):
    for tokens in (0, 5):
        x, weight, bias, targets = problem(tokens, 19, 6)
        inputs = leaves(x, weight, bias, dtypes=(dtype, torch.float32, torch.float32))
        targets[:] = IGNORED
        with set_backend(backend):
            out = linear_cross_entropy(inputs[0], inputs[1], targets, bias=inputs[2])
            grads = gradients(out.loss, inputs)
            given = label_smoothing_loss(torch.randn(tokens, 19).to(dtype), targets)
        for number in (*out, *given):
            assert number.item() == 0
        for grad, tensor in zip(grads, inputs, strict=True):
            assert torch.equal(grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_target_have_no_effect_whatever_they_hold(backend, dtype, way):
    x, weight, bias, targets = problem(40, 33, 8, ignored=0.4)
    ignored = targets == IGNORED
    results = []
    for poison in (0.0, torch.nan, torch.inf):
        dirty = x.clone()
        dirty[ignored] = poison
        inputs = leaves(dirty, weight, bias, dtypes=(dtype, torch.float32, torch.float32))
        with set_backend(backend):
            out = linear_cross_entropy(inputs[0], inputs[1], targets, bias=inputs[2])
            results.append((*out, *gradients(out.loss, inputs)))
            logits = (dirty @ weight.T).to(dtype).requires_grad_()
            given = label_smoothing_loss(logits, targets)
            results[-1] += (*given, *gradients(given.loss, (logits,)))
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert torch.equal(a, b)
    assert (results[0][4][ignored] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_great_logits_do_not_overflow(backend, dtype):
    logits = torch.tensor([[3e38, -3e38, 0.0], [1e30, 1e30, 1e30], [-3e38, -3e38, -3e38]]).to(dtype)
    logits.requires_grad_()
    with set_backend(backend):
        out = label_smoothing_loss(logits, torch.tensor([0, 1, 2]), label_smoothing=0.0)
        (grad,) = gradients(out.loss, (logits,))
    assert out.loss.item() == pytest.approx(2 * 1.0986123)
    expected = torch.full((3, 3), 1 / 3) - torch.eye(3)
    expected[0] = 0
    torch.testing.assert_close(grad.float(), expected, rtol=4e-3, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_forbidden_tokens_without_smoothing(backend):
    logits = torch.tensor([[0.0, -torch.inf, 0.0]], requires_grad=True)
    with set_backend(backend):
        out = label_smoothing_loss(logits, torch.tensor([2]), label_smoothing=0.0)
        (grad,) = gradients(out.loss, (logits,))
    assert out.loss.item() == pytest.approx(0.6931472)
    torch.testing.assert_close(grad, torch.tensor([[0.5, 0.0, -0.5]]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_of_equal_maxima_the_first_is_the_arg_max(backend, dtype):
    logits = torch.zeros(6, 70)
    logits[:, (3, 40)] = 2.0
    logits[5, 69] = torch.nan
    targets = torch.tensor([3, 40, 0, 69, IGNORED, 3])
    with set_backend(backend):
        out = label_smoothing_loss(logits[:5].to(dtype), targets[:5])
        every = [
            label_smoothing_loss(torch.zeros(1, 70, dtype=dtype), torch.tensor([t])).correct.item()
            for t in range(70)
        ]
    assert out.correct.item() == 1
    assert every == [1] + [0] * 69


@needs_compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_give_the_result_of_one(monkeypatch, dtype, way):
    x, weight, bias, targets = problem(150, 90, 16, ignored=0.1)
    inputs = leaves(x, weight, bias, dtypes=(dtype, torch.float32, torch.float32))
    results = []
    for rows in (1000, 136, 64, 16, 7, 1):
        monkeypatch.setattr(subject, "_chunk_rows", lambda *_, rows=rows: rows)
        out = linear_cross_entropy(inputs[0], inputs[1], targets, bias=inputs[2], normalizer=9.0)
        results.append((*out, *gradients(out.loss, inputs)))
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_chunks_are_bounded_and_cover_all_rows():
    for rows in (0, 1, 15, 100, 4096, 100_000):
        for row_bytes in (2, 400, 16_000, 128_000, 4_000_000):
            for most in subject._CHUNK_BYTES.values():
                chunk = subject._chunk_rows(rows, row_bytes, most)
                assert chunk >= 1
                assert chunk * row_bytes <= max(most, subject._MIN_CHUNK_ROWS * row_bytes)
    assert subject._chunk_rows(25_000, 74_000, subject._CHUNK_BYTES["cuda"]) == 8336


@needs_compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_never_all_in_memory(monkeypatch, dtype, way):
    tokens, vocabulary, features = 2048, 2000, 8
    monkeypatch.setitem(subject._CHUNK_BYTES, "cpu", 128 * vocabulary * dtype.itemsize)
    monkeypatch.setattr(subject, "_memory", type(subject._memory)())
    x, weight, _, targets = problem(tokens, vocabulary, features)
    x, weight = leaves(x, weight, dtypes=(dtype, torch.float32))
    shapes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
            result = function(*arguments, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    shapes.append(tensor.untyped_storage().nbytes())
            return result

    with Watch():
        # What the op does inside is seen by calling its implementation.
        subject._linear_cross_entropy(
            x.detach(), weight.detach(), None, targets, None, 0.1, IGNORED, True, True, False
        )
    assert max(shapes) == 128 * vocabulary * dtype.itemsize
    before = dict(subject._memory.buffers)
    linear_cross_entropy(x, weight, targets).loss.backward()
    assert {name: buffer.data_ptr() for name, buffer in before.items()} == {
        name: buffer.data_ptr() for name, buffer in subject._memory.buffers.items()
    }, "the workspace is reused"


@needs_compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_one_is_not_copied(dtype):
    x, weight, _, targets = problem(20, 30, 8)
    x, weight = leaves(x, weight, dtypes=(dtype, torch.float32))
    loss = linear_cross_entropy(x, weight, targets).loss
    pointers = [saved.data_ptr() for saved in loss.grad_fn.saved_tensors[:2]]
    loss.backward()
    assert [x.grad.data_ptr(), weight.grad.data_ptr()] == pointers


@needs_compiled
def test_backward_twice_and_with_a_factor():
    x, weight, _, targets = problem(20, 30, 8)
    x, weight = leaves(x, weight, dtypes=(torch.float32,) * 2)
    loss = linear_cross_entropy(x, weight, targets).loss
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward(retain_graph=True)
    (loss * 3).backward()
    torch.testing.assert_close(weight.grad, once * 5)


@needs_compiled
def test_only_the_gradients_asked_for():
    x, weight, bias, targets = problem(20, 30, 8)
    for wanted in range(1, 8):
        inputs = [t.float() for t in (x, weight, bias)]
        for i, t in enumerate(inputs):
            t.requires_grad_(bool(wanted >> i & 1))
        linear_cross_entropy(inputs[0], inputs[1], targets, bias=inputs[2]).loss.backward()
        for i, t in enumerate(inputs):
            assert (t.grad is not None) == bool(wanted >> i & 1)
    with torch.no_grad():
        out = linear_cross_entropy(*(t.float() for t in (x, weight)), targets)
    assert not out.loss.requires_grad


@needs_compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_thread_count(dtype):
    ops = torch.ops.transformer_ext
    logits = (torch.randn(70, 4099) * 3).to(dtype)
    targets = torch.randint(0, 4099, (70,))
    targets[::7] = IGNORED
    results = []
    for count in (1, 2, 4):
        with threads(count):
            sums, grad = ops.cross_entropy(logits, targets, None, 0.1, IGNORED, True)
            column = torch.ones(4099)
            ops.column_sum_(column, grad, True)
            results.append((sums, grad, column))
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert torch.equal(a, b)


@needs_compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_column_sums_and_added_gradients(dtype):
    ops = torch.ops.transformer_ext
    for rows, columns in ((0, 5), (3, 1), (17, 71), (5, 2083)):
        x = torch.randn(rows, columns + 3).to(dtype)[:, :columns]
        out = torch.full((columns,), torch.nan)
        ops.column_sum_(out, x, False)
        torch.testing.assert_close(out, x.float().sum(0), rtol=1e-5, atol=1e-5)
        ops.column_sum_(out, x, True)
        torch.testing.assert_close(out, 2 * x.float().sum(0), rtol=1e-5, atol=1e-5)


@needs_compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_raw_ops_are_sound(dtype):
    ops = torch.ops.transformer_ext
    logits = torch.randn(6, 40).to(dtype)
    targets = torch.randint(0, 40, (6,))
    scale = torch.tensor(0.5)
    bias = torch.randn(40)
    for write in (False, True):
        torch.library.opcheck(
            ops.cross_entropy.default, (logits, targets, scale, 0.1, IGNORED, write)
        )
        torch.library.opcheck(
            ops.cross_entropy_.default, (logits.clone(), bias, targets, None, 0.1, IGNORED, write)
        )
    torch.library.opcheck(ops.column_sum_.default, (bias.clone(), logits, True))
    x, weight = torch.randn(6, 8).to(dtype), torch.randn(40, 8)
    for wanted in ((True, True, True), (False, True, False), (False, False, False)):
        torch.library.opcheck(
            ops.linear_cross_entropy.default,
            (x, weight, bias, targets, scale, 0.1, IGNORED, *wanted),
        )


@needs_compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiles_to_one_graph(dtype):
    x, weight, bias, targets = problem(24, 50, 8)
    inputs = leaves(x, weight, bias, dtypes=(dtype, torch.float32, torch.float32))

    def step(x, weight, bias):
        out = linear_cross_entropy(x * 2, weight, targets, bias=bias, normalizer=4.0)
        logits = functional.linear(x, weight.to(x.dtype))
        return out.loss + label_smoothing_loss(logits, targets).loss, out.nll_sum

    expected, nll = step(*inputs)
    got, compiled_nll = torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(compiled_nll, nll)
    for a, b in zip(gradients(got, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(a, b)


@needs_compiled
def test_autocast_runs_the_products_in_bfloat16():
    x, weight, _, targets = problem(24, 50, 8)
    inputs = leaves(x, weight, dtypes=(torch.float32,) * 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_cross_entropy(*inputs, targets)
    expected = linear_cross_entropy(inputs[0].bfloat16(), inputs[1], targets)
    assert torch.equal(out.loss, expected.loss)
    out.loss.backward()
    assert inputs[0].grad.dtype == inputs[1].grad.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_arguments_are_named(backend):
    x, weight, targets = torch.randn(4, 8), torch.randn(10, 8), torch.tensor([0, 9, 3, 4])
    with set_backend(backend):
        for arguments, options, error, message in (
            ((x[0], weight, targets), {}, ValueError, r"x: expected \[tokens"),
            ((x, weight[:, :7], targets), {}, ValueError, r"weight: expected \[vocabulary, 8\]"),
            ((x, weight, targets[:3]), {}, ValueError, "targets: expected shape"),
            ((x, weight, targets.int()), {}, TypeError, "targets: expected int64"),
            ((x, weight, targets), {"bias": torch.zeros(9)}, ValueError, r"bias: expected \[10\]"),
            ((x, weight, targets), {"label_smoothing": 1.5}, ValueError, "label_smoothing"),
            ((x, weight, targets), {"normalizer": 0}, ValueError, "normalizer: .* 0, got 0"),
            ((x, weight, targets + 1), {}, IndexError, "10|out of bounds"),
            ((x, weight, targets - 1), {}, IndexError, "-1|out of bounds"),
        ):
            with pytest.raises(error, match=message):
                linear_cross_entropy(*arguments, **options)
        with pytest.raises(IndexError):
            label_smoothing_loss(torch.randn(4, 9), targets)
        with pytest.raises(ValueError, match="the rows of logits"):
            label_smoothing_loss(torch.randn(2, 9), targets)
    if backend == "compiled":
        with pytest.raises(ValueError, match="normalizer"):
            linear_cross_entropy(x, weight, targets, normalizer=torch.ones(2))
        with pytest.raises(IndexError, match="^targets: got 9 in row 1"):
            torch.ops.transformer_ext.cross_entropy_(
                torch.randn(4, 9), None, targets, None, 0.1, IGNORED, True
            )


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [1, 5, 64, 1000, 32001])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cuda_kernel(vocabulary, dtype, label_smoothing):
    """The kernel runs on the CPU too, in csrc/cross_entropy/cross_entropy_cuda_test.cpp."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (torch.randn(9, vocabulary, generator=generator) * 4).to(dtype)
    targets = torch.randint(vocabulary, (9,), generator=generator)
    targets[::4] = -100
    options = {"label_smoothing": label_smoothing, "normalizer": 7.0}

    def run(face, rows, where):
        leaf = rows.to(where).requires_grad_()
        output = face(leaf, targets.to(where), **options)
        (grad,) = torch.autograd.grad(output.loss, leaf)
        return output.loss.detach().cpu(), output.nll_sum.detach().cpu(), grad.cpu()

    exact = run(subject.label_smoothing_loss_reference, logits.double(), "cpu")
    peer = run(subject.label_smoothing_loss_reference, logits, "cpu")
    with set_backend("compiled"):
        got = run(subject.label_smoothing_loss, logits, "cuda")
    for ours, true, plain in zip(got, exact, peer, strict=True):
        assert_as_precise(ours, true, plain.to(ours.dtype), factor=4.0, roundings=4.0)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [97, 1000])
def test_cuda_projection_and_loss(vocabulary, dtype, monkeypatch):
    """In chunks; the loop runs on the CPU too, "as on a GPU" above."""
    monkeypatch.setattr(subject, "_chunk_rows", lambda *_: 48)
    x, weight, bias, targets = problem(100, vocabulary, 24)
    x[targets == IGNORED] = torch.nan
    factor = 1024.0  # as that of a scaled loss

    def run(face, dtypes, device):
        inputs = [t.to(device) for t in leaves(x.to(dtype), weight.float(), bias, dtypes=dtypes)]
        out = face(inputs[0], inputs[1], targets.to(device), bias=inputs[2], normalizer=25_000.0)
        results = (out.loss, *gradients(out.loss * factor, inputs))
        return [t.detach().cpu() for t in results]

    exact = run(subject.linear_cross_entropy_reference, (torch.float64,) * 3, "cpu")
    plain = (dtype, torch.float32, torch.float32)
    peer = run(subject.linear_cross_entropy_reference, plain, "cuda")
    with set_backend("compiled"):
        results = [run(linear_cross_entropy, plain, "cuda") for _ in range(2)]
    for ours, again in zip(*results, strict=True):
        assert torch.equal(ours, again)
    assert_all_as_precise(results[0], exact, peer)


@needs_gpu
def test_cuda_projection_and_loss_in_a_graph_and_little_memory(monkeypatch):
    # All logits at once are 128 MiB: what libraries of products ask for themselves is up to 32.
    rows, vocabulary = 4096, 16384
    monkeypatch.setitem(subject._CHUNK_BYTES, "cuda", 128 * vocabulary * 2)
    x, weight, _, targets = (
        t.cuda() if t is not None else t for t in problem(rows, vocabulary, 16)
    )
    x, weight = leaves(x, weight, dtypes=(torch.bfloat16, torch.float32))
    divisor = torch.tensor(100.0, device="cuda")

    def step():
        loss = linear_cross_entropy(x, weight, targets, normalizer=divisor).loss
        return loss.detach(), *gradients(loss, (x, weight))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), set_backend("compiled"):
        step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        expected = [t.clone() for t in step()]
        assert torch.cuda.max_memory_allocated() - before < rows * vocabulary
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            recorded = step()
        divisor.mul_(2.0)
        graph.replay()
        torch.cuda.synchronize()
    for got, once in zip(recorded, expected, strict=True):
        torch.testing.assert_close(got * 2, once)
