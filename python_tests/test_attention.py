import importlib
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from kernel_testing import (
    BACKENDS,
    assert_graph_safe,
    needs_compiled,
    needs_gpu,
    set_backend,
    threads,
)

from transformer_ext.ops import _tensor_cores
from transformer_ext.ops.attention import (
    attention,
    attention_packed,
    attention_reference,
    cross_attention_packed,
    self_attention_packed,
)
from transformer_ext.ops.dropout import dropout_scale, keep_mask
from transformer_ext.packed import Packed

DTYPES = (torch.float32, torch.bfloat16)
RNG = torch.tensor([2**40 + 5, 3, 1])

# batch, heads, kv_heads, query_length, key_length, head_dim
SHAPES = [
    (2, 4, 4, 7, 7, 64),
    (3, 4, 2, 33, 33, 17),
    (1, 6, 1, 19, 40, 8),
    (2, 2, 2, 1, 50, 3),
    (2, 3, 1, 16, 1, 128),
    (1, 2, 1, 130, 257, 64),
    (2, 2, 2, 300, 129, 5),
    (1, 1, 1, 1025, 1025, 33),
    (20, 1, 1, 5, 600, 16),
]


def problem(shape, seed=0):
    """Query, key, value and the gradient of the output, in float64."""
    batch, heads, kv_heads, queries, keys, head_dim = shape
    generator = torch.Generator().manual_seed(seed)

    def make(heads, length):
        # Rounded, so that the same numbers are put in at every precision.
        x = torch.randn(batch, heads, length, head_dim, generator=generator)
        return x.to(torch.bfloat16).double()

    return make(heads, queries), make(kv_heads, keys), make(kv_heads, keys), make(heads, queries)


def run(face, inputs, grad, **options):
    """Output and gradients."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = face(*inputs, **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def assert_norm_as_precise(got, exact, peer, factor=2.0):
    """The norm of the error is at most ``factor`` times that of the composition ``peer``, but for
    one rounding. The norm, not the maximum: the greatest of a few hundred errors is luck."""
    assert got.dtype == peer.dtype and got.shape == exact.shape
    exact = exact.double()
    error, allowed = (got.double() - exact).norm(), factor * (peer.double() - exact).norm()
    allowed += torch.finfo(got.dtype).eps / 2 * exact.norm()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def compare(inputs, grad, dtype, **options):
    """Every result of the compiled op against float64, and its error against the composition's."""
    exact = run(attention_reference, inputs, grad, **options)
    inputs, grad = [x.to(dtype) for x in inputs], grad.to(dtype)
    with set_backend("compiled"):
        got = run(attention, inputs, grad, **options)
    peer = run(attention_reference, inputs, grad, **options)
    for g, e, p in zip(got, exact, peer, strict=True):
        assert_norm_as_precise(g, e, p)
    return got


@needs_compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_precision_against_float64(shape, causal, dtype):
    *inputs, grad = problem(shape)
    lengths = torch.arange(shape[0]) * 7 % shape[4] + 1
    compare(inputs, grad, dtype, causal=causal, key_lengths=lengths)


@needs_compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 2, 15, 16, 31, 48, 63, 65, 80, 127, 128])
def test_precision_of_head_dims(head_dim, dtype):
    *inputs, grad = problem((2, 2, 1, 21, 35, head_dim))
    compare(inputs, grad, dtype, scale=0.3)


@needs_compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 47, 48, 64, 80, 96, 127, 128, 129])
def test_precision_of_lengths(length, dtype):
    *inputs, grad = problem((1, 2, 2, length, length, 24))
    compare(inputs, grad, dtype, causal=length % 2 == 0)


@needs_compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:7])
def test_precision_with_dropout(shape, dtype):
    *inputs, grad = problem(shape)
    compare(inputs, grad, dtype, dropout_p=0.3, rng=RNG, site=9)


@needs_compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask_shape", [(2, 1, 1, 40), (1, 4, 30, 40), (2, 4, 30, 40), (30, 1)])
def test_precision_with_mask(mask_shape, dtype):
    *inputs, grad = problem((2, 4, 2, 30, 40, 20))
    mask = torch.rand(mask_shape, generator=torch.Generator().manual_seed(1)) < 0.6
    got = compare(inputs, grad, dtype, mask=mask)
    transposed = mask.transpose(-1, -2).contiguous().transpose(-1, -2)
    with set_backend("compiled"):
        again = run(attention, [x.to(dtype) for x in inputs], grad.to(dtype), mask=transposed)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@needs_compiled
@pytest.mark.parametrize("length", [30, 200])
@pytest.mark.parametrize("axes", list(itertools.product([False, True], repeat=4)))
def test_bias_and_its_gradient(axes, length):
    shape = (2, 4, 2, length, length + 10, 20)
    *inputs, grad = problem(shape)
    full = (2, 4, length, length + 10)
    sizes = tuple(n if keep else 1 for n, keep in zip(full, axes, strict=True))
    bias = torch.randn(sizes, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    if axes[3]:
        bias[..., 3] = -math.inf

    def face(query, key, value, bias):
        return attention(query, key, value, bias=bias, causal=True)

    with set_backend("reference"):
        exact = run(face, [*inputs, bias], grad)
    single = [x.float() for x in (*inputs, bias)]
    with set_backend("compiled"):
        got = run(face, single, grad.float())
    with set_backend("reference"):
        peer = run(face, single, grad.float())
    for g, e, p in zip(got[:4], exact[:4], peer[:4], strict=True):
        assert_norm_as_precise(g, e, p)
    if axes[3]:
        # Sums over up to 1600 rows, which the kernel adds one by one.
        assert_norm_as_precise(got[4], exact[4], peer[4], factor=6.0)
    else:
        # Softmax does not see a bias that is the same for all keys: rounding errors are all there is.
        terms = grad[..., 0].numel() * (length + 10) / bias.numel()
        assert got[4].abs().max() <= 4 * torch.finfo(torch.float32).eps * terms**0.5


@needs_compiled
def test_finite_differences():
    """The gradient in float32 against slopes of the compiled forward pass."""
    *inputs, grad = problem((1, 2, 1, 5, 6, 4), seed=3)
    inputs, grad = [x.float() for x in inputs], grad.float()
    options = {"key_lengths": torch.tensor([5]), "dropout_p": 0.25, "rng": RNG, "site": 2}
    with set_backend("compiled"):
        _, *grads = run(attention, inputs, grad, **options)
        for i, x in enumerate(inputs):
            direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
            step = 1e-2
            ends = []
            for sign in (1, -1):
                moved = [y + sign * step * direction if j == i else y for j, y in enumerate(inputs)]
                ends.append((attention(*moved, **options).double() * grad).sum())
            slope = (ends[0] - ends[1]) / (2 * step)
            assert (grads[i].double() * direction).sum() == pytest.approx(slope.item(), rel=2e-3)


def test_reference_gradient():
    *inputs, _ = problem((2, 2, 1, 3, 4, 5))
    inputs = [x.requires_grad_() for x in inputs]
    bias = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([0, 3])
    assert torch.autograd.gradcheck(
        lambda q, k, v, b: attention_reference(
            q, k, v, key_lengths=lengths, causal=True, bias=b, dropout_p=0.2, rng=RNG
        ),
        (*inputs, bias),
    )


@pytest.mark.parametrize("causal", [False, True])
def test_reference_is_the_formula(causal):
    query, key, value, _ = problem((2, 4, 2, 6, 6, 8))
    peer = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=causal, enable_gqa=True
    )
    torch.testing.assert_close(attention_reference(query, key, value, causal=causal), peer)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [9, 300])
def test_fully_masked_rows_are_zero(length, dtype, backend):
    *inputs, grad = problem((3, 2, 2, length, length, 12))
    inputs = [x.to(dtype) for x in inputs]
    mask = torch.ones(3, 1, length, length, dtype=torch.bool)
    mask[2, :, 4] = False
    inputs[0][2, :, 4] = math.nan  # a query that may attend to nothing
    lengths = torch.tensor([length, 0, length - 1])
    with set_backend(backend):
        out, *grads = run(attention, inputs, grad.to(dtype), mask=mask, key_lengths=lengths)
    assert not out[1].any() and not out[2, :, 4].any()
    assert all(not g[1].any() for g in grads)
    assert not grads[0][2, :, 4].any()
    assert all(x.isfinite().all() for x in (out, *grads))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by", ["key_lengths", "mask", "bias"])
@pytest.mark.parametrize("length", [10, 140])
def test_padding_never_leaks(length, by, dtype, backend):
    *inputs, grad = problem((2, 4, 2, 8, length, 20))
    query, key, value = (x.to(dtype) for x in inputs)
    seen = torch.arange(length) < length - 6
    if by == "key_lengths":
        options = {"key_lengths": torch.tensor([length - 6, length - 6])}
    elif by == "mask":
        options = {"mask": seen[None, None, None]}
    else:
        options = {"bias": torch.zeros(length).masked_fill(~seen, -math.inf)[None, None, None]}
    with set_backend(backend):
        clean = run(attention, (query, key, value), grad.to(dtype), **options)
        for poison in (math.nan, math.inf):
            key[:, :, length - 6 :] = poison
            value[:, :, length - 6 :] = poison
            dirty = run(attention, (query, key, value), grad.to(dtype), **options)
            assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert not clean[2][:, :, length - 6 :].any() and not clean[3][:, :, length - 6 :].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_packed_is_padded_without_padding(heads, causal, dtype, backend):
    lengths = [5, 0, 60, 33, 1, 140]
    packed = Packed.from_lengths(lengths, capacity=sum(lengths) + 9)
    width = (heads[0] + 2 * heads[1]) * 20
    qkv = torch.randn(packed.capacity, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    grad = torch.randn(packed.capacity, heads[0] * 20).to(dtype)
    qkv[packed.tokens :] = math.nan
    grad[packed.tokens :] = math.nan

    def padded(qkv):
        x = packed.unpack(qkv).unflatten(2, (sum(heads) + heads[1], 20)).transpose(1, 2)
        query, key, value = x.split((heads[0], heads[1], heads[1]), dim=1)
        out = attention(query, key, value, key_lengths=packed.lengths, causal=causal)
        return packed.pack(out.transpose(1, 2).flatten(2))

    with set_backend(backend):
        out, grad_qkv = run(self_attention_packed, [qkv], grad, heads=heads[0], kv_heads=heads[1],
                            packed=packed, causal=causal)  # fmt: skip
        peer, grad_peer = run(padded, [qkv], grad)
    assert not out[packed.tokens :].any() and not grad_qkv[packed.tokens :].any()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out, peer, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(grad_qkv, grad_peer, atol=tolerance, rtol=tolerance)


@needs_compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_faces_agree_with_reference(dtype):
    lengths, source_lengths = [3, 17, 0, 40], [9, 1, 4, 0]
    q = Packed.from_lengths(lengths, capacity=70)
    k = Packed.from_lengths(source_lengths)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(70, 4 * 10, generator=generator)
    kv = torch.randn(14, 2 * 2 * 10, generator=generator)
    grad = torch.randn(70, 4 * 10, generator=generator)
    options = {"dropout_p": 0.2, "rng": RNG, "site": 4}

    def cross(query, kv):
        return cross_attention_packed(query, kv, 4, 2, q, k, **options)

    def separate(query, kv):
        key, value = kv.unflatten(1, (4, 10)).split(2, dim=1)
        out = attention_packed(query.unflatten(1, (4, 10)), key, value, q=q, k=k, **options)
        return out.flatten(1)

    with set_backend("reference"):
        exact = run(cross, [query.double(), kv.double()], grad.double())
        exact = run(cross, [query.to(dtype).double(), kv.to(dtype).double()],
                    grad.to(dtype).double())  # fmt: skip
        peer = run(cross, [query.to(dtype), kv.to(dtype)], grad.to(dtype))
    with set_backend("compiled"):
        for face in (cross, separate):
            got = run(face, [query.to(dtype), kv.to(dtype)], grad.to(dtype))
            for g, e, p in zip(got, exact, peer, strict=True):
                assert_norm_as_precise(g, e, p)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
@pytest.mark.parametrize("slack", [0, 3])
def test_no_tokens(slack, lengths, backend):
    packed = Packed.from_lengths(lengths, capacity=slack)
    qkv = torch.full((slack, 3 * 2 * 8), math.nan)
    with set_backend(backend):
        out, grad = run(self_attention_packed, [qkv], torch.ones(slack, 16), heads=2, kv_heads=2,
                        packed=packed)  # fmt: skip
    assert out.shape == (slack, 16) and not out.any() and not grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 2, 2, 4, 4, 8), (2, 2, 2, 0, 4, 8), (2, 2, 2, 4, 0, 8)])
def test_empty(shape, backend):
    *inputs, grad = problem(shape)
    with set_backend(backend):
        out, *grads = run(attention, [x.float() for x in inputs], grad.float())
    assert out.shape == inputs[0].shape and not out.any()
    assert all(not g.any() for g in grads)


@needs_compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype):
    *inputs, grad = problem((2, 4, 2, 13, 13, 24))
    inputs, grad = [x.to(dtype) for x in inputs], grad.to(dtype)
    with set_backend("compiled"):
        dense = run(attention, inputs, grad)
        for order in ((0, 2, 1, 3), (2, 1, 0, 3), (0, 1, 3, 2)):
            back = [order.index(i) for i in range(4)]
            strided = [x.permute(order).contiguous().permute(back) for x in (*inputs, grad)]
            again = run(attention, strided[:3], strided[3])
            assert all(torch.equal(a, b) for a, b in zip(dense, again, strict=True))
        x = inputs[1].requires_grad_()
        attention(x[:, :1].expand(-1, 4, -1, -1), x, x).sum().backward()
        assert x.grad is not None and x.grad.isfinite().all()


@needs_compiled
@pytest.mark.parametrize("causal", [False, True])
def test_dropout_mask_is_the_twins(causal):
    """With values that are unit vectors the output is the dropped weights themselves."""
    batch, heads, queries, keys = 2, 3, 9, 100
    query, key = torch.randn(batch, heads, queries, 8), torch.randn(batch, heads, keys, 8)
    value = torch.eye(keys).expand(batch, heads, keys, keys)
    query = torch.nn.functional.pad(query, (0, keys - 8))
    key = torch.nn.functional.pad(key, (0, keys - 8))
    with set_backend("compiled"):
        weights = attention(query, key, value, causal=causal)
        dropped = attention(query, key, value, causal=causal, dropout_p=0.4, rng=RNG, site=5)
    token = torch.arange(batch * queries).view(batch, 1, queries)
    rows = token * heads + torch.arange(heads).view(1, heads, 1)
    keep = keep_mask(RNG, 5, rows.flatten(), keys, 0.4).view(batch, heads, queries, keys)
    torch.testing.assert_close(dropped, weights * keep * dropout_scale(0.4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_of_everything(backend):
    *inputs, grad = problem((1, 2, 2, 5, 6, 8))
    with set_backend(backend):
        results = run(attention, [x.float() for x in inputs], grad.float(), dropout_p=1.0, rng=RNG)
    assert all(not x.any() for x in results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_returned_weights(backend):
    query, key, value, _ = problem((2, 4, 2, 5, 7, 8))
    query, key, value = query.float(), key.float(), value.float()
    lengths = torch.tensor([7, 0])
    with set_backend(backend):
        out, weights = attention(query, key, value, key_lengths=lengths, return_weights=True)
        plain = attention(query, key, value, key_lengths=lengths)
    assert weights.shape == (2, 4, 5, 7)
    torch.testing.assert_close(weights.sum(-1)[0], torch.ones(4, 5))
    assert not weights[1].any()
    torch.testing.assert_close(weights @ value.repeat_interleave(2, 1), out)
    torch.testing.assert_close(plain, out)


def test_returned_scores():
    query, key, value, _ = problem((2, 4, 2, 5, 7, 8))
    options = {"key_lengths": torch.tensor([7, 0]), "causal": True, "scale": 0.5}
    out, weights, scores = attention(query, key, value, **options, return_scores=True)
    expected = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.5
    seen = torch.ones(5, 7, dtype=torch.bool).tril().expand(4, 5, 7)
    torch.testing.assert_close(scores[0][seen], expected[0][seen])
    assert (scores[0][~seen] == -torch.inf).all() and (scores[1] == -torch.inf).all()
    again, same = attention(query, key, value, **options, return_weights=True)
    assert torch.equal(out, again) and torch.equal(weights, same)


@needs_compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 4, 2, 33, 33, 16), (1, 2, 2, 700, 650, 16)])
def test_same_bits_for_any_number_of_threads(shape, dtype):
    *inputs, grad = problem(shape)
    bias = torch.randn(1, shape[1], 1, shape[4], dtype=torch.float64)
    inputs = [x.to(dtype) for x in (*inputs, bias)]

    def face(query, key, value, bias):
        return attention(query, key, value, bias=bias, dropout_p=0.1, rng=RNG, causal=True)

    results = []
    for count in (1, 2, 4):
        with threads(count), set_backend("compiled"):
            results.append(run(face, inputs, grad.to(dtype)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@needs_compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_does_not_depend_on_its_batch(dtype):
    qkv = torch.randn(90, 3 * 2 * 16).to(dtype)
    with set_backend("compiled"):
        together = self_attention_packed(qkv, 2, 2, Packed.from_lengths([30, 41, 19]), True)
        alone = self_attention_packed(qkv[30:71], 2, 2, Packed.from_lengths([41]), True)
    assert torch.equal(together[30:71], alone)


@needs_compiled
def test_opcheck():
    ops = torch.ops.transformer_ext
    tests = ("test_schema", "test_faketensor")
    query, key, value, grad = (x.float() for x in problem((2, 4, 2, 5, 7, 8)))
    lengths, mask = torch.tensor([7, 3]), torch.rand(1, 1, 5, 7) < 0.9
    bias = torch.randn(2, 1, 1, 7)
    options = (lengths, mask, bias, 5, 7, False, 0.3, 0.1, RNG, 3)
    args = (query, key, value, None, None, *options)
    torch.library.opcheck(ops.attention_forward.default, args, test_utils=tests)
    out, lse = ops.attention_forward(*args)
    grads = [torch.empty_like(x) for x in (query, key, value)]
    backward = (grad, query, key, value, out.transpose(1, 2), lse, None, None, *options)
    torch.library.opcheck(
        ops.attention_backward.default,
        (*backward, *grads, torch.zeros_like(bias)),
        test_utils=tests,
    )
    ends = torch.tensor([0, 3, 9], dtype=torch.int32)
    packed = torch.randn(10, 2, 8)
    torch.library.opcheck(
        ops.attention_forward.default,
        (packed, packed, packed, ends, ends, None, None, None, 6, 6, True, 1.0, 0.0, None, 0),
        test_utils=tests,
    )


@needs_compiled
def test_compiles_in_one_graph():
    packed, source = Packed.from_lengths([5, 9], capacity=16), Packed.from_lengths([3, 4])
    qkv = torch.randn(16, 3 * 2 * 8, requires_grad=True)
    kv = torch.randn(7, 2 * 2 * 8, requires_grad=True)

    def f(qkv, kv):
        x = self_attention_packed(qkv, 2, 2, packed, True, dropout_p=0.1, rng=RNG, site=1)
        x = cross_attention_packed(x, kv, 2, 2, packed, source)
        y = x[:14].view(2, 7, 2, 8).transpose(1, 2)
        return x.square().sum() + attention(y, y, y, causal=True).sum()

    with set_backend("compiled"):
        expected = f(qkv, kv)
        expected_grads = torch.autograd.grad(expected, (qkv, kv))
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        got = compiled(qkv, kv)
        got_grads = torch.autograd.grad(got, (qkv, kv))
    torch.testing.assert_close(got, expected)
    for a, b in zip(got_grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b)


def _replaced(**changes):
    tensors = {"query": torch.zeros(2, 4, 5, 8), "key": torch.zeros(2, 2, 6, 8)}
    tensors["value"] = tensors["key"]
    return {**tensors, **changes}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (_replaced(query=torch.zeros(4, 5, 8)), ValueError, "query: expected .batch"),
        (_replaced(query=torch.zeros(2, 4, 5, 8, dtype=torch.int64)), TypeError, "query"),
        (_replaced(key=torch.zeros(2, 2, 6, 8).bfloat16()), TypeError, "key: expected the query"),
        (_replaced(value=torch.zeros(2, 2, 7, 8)), ValueError, "value: expected the key's shape"),
        (_replaced(query=torch.zeros(2, 4, 5, 9)), ValueError, "head_dim 9"),
        (_replaced(query=torch.zeros(2, 3, 5, 8)), ValueError, "heads that divide"),
        (_replaced(query=torch.zeros(3, 4, 5, 8)), ValueError, "batch size 3"),
        (_replaced(key_lengths=torch.zeros(3, dtype=torch.int64)), ValueError, "key_lengths"),
        (_replaced(mask=torch.zeros(5, 6)), TypeError, "mask: expected bool"),
        (_replaced(mask=torch.ones(5, 5, dtype=torch.bool)), ValueError, "mask: expected a shape"),
        (_replaced(bias=torch.zeros(5, 5)), ValueError, "bias: expected a shape"),
        (_replaced(bias=torch.zeros(5, 6, dtype=torch.int32)), TypeError, "bias"),
        (
            _replaced(key_lengths=torch.tensor([6, 7])),
            IndexError,
            "^key_lengths: got 7, expected 0 to 6$",
        ),
        (_replaced(dropout_p=1.5, rng=RNG), ValueError, "dropout probability"),
    ],
)
def test_errors(arguments, error, text, backend):
    with set_backend(backend), pytest.raises(error, match=text):
        attention(**arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_errors(backend):
    packed = Packed.from_lengths([2, 3])
    with set_backend(backend):
        with pytest.raises(ValueError, match="qkv: expected"):
            self_attention_packed(torch.zeros(5, 25), 2, 1, packed)
        with pytest.raises(ValueError, match="5 rows, got"):
            self_attention_packed(torch.zeros(6, 24), 2, 2, packed)
        with pytest.raises(ValueError, match="2 sequences"):
            cross_attention_packed(
                torch.zeros(5, 8), torch.zeros(4, 16), 2, 2, packed, Packed.from_lengths([4])
            )


@needs_compiled
def test_raw_op_refuses_a_wrong_table_of_sequences():
    x = torch.zeros(5, 2, 8)
    good = torch.tensor([0, 2, 5], dtype=torch.int32)
    for wrong in ([0, 2, 6], [0, 4, 3], [1, 2, 5], [0, 5, 5]):
        ends = torch.tensor(wrong, dtype=torch.int32)
        with pytest.raises(IndexError, match="^cu_seqlens_k: expected ascending"):
            torch.ops.transformer_ext.attention_forward(
                x, x, x, good, ends, None, None, None, 3, 3, False, 1.0, 0.0, None, 0
            )


# --- on a GPU: the kernels run on the CPU in csrc/attention/attention_cuda_test.cpp ---------------

CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def compare_on_cuda(inputs, grad, dtype, **options):
    exact = run(attention_reference, inputs, grad, **options)
    inputs, grad = [x.to(dtype) for x in inputs], grad.to(dtype)
    peer = run(attention_reference, inputs, grad, **options)
    moved = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    with set_backend("compiled"), _tensor_cores.only(True):
        got = run(attention, [x.cuda() for x in inputs], grad.cuda(), **moved)
    for g, e, p in zip(got, exact, peer, strict=True):
        assert_norm_as_precise(g.cpu(), e, p)


@needs_gpu
@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_cuda_precision_against_float64(shape, causal, dtype):
    *inputs, grad = problem(shape)
    lengths = torch.arange(shape[0]) * 7 % shape[4] + 1
    compare_on_cuda(inputs, grad, dtype, causal=causal, key_lengths=lengths)


@needs_gpu
@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize("head_dim", [1, 3, 31, 32, 33, 64, 80, 128, 200, 256])
def test_cuda_head_dims_and_dropout(head_dim, dtype):
    *inputs, grad = problem((2, 2, 1, 21, 35, head_dim))
    compare_on_cuda(inputs, grad, dtype, scale=0.3, dropout_p=0.3, rng=RNG, site=4)


@needs_gpu
@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize("head_dim, kind", [(16, ""), (64, "tensor"), (64, "simple")])
def test_cuda_packed_equals_cpu(head_dim, kind, dtype, monkeypatch):
    monkeypatch.setenv("TRANSFORMER_EXT_CUDA_ATTENTION", kind)
    packed = Packed.from_lengths([5, 1, 33, 70], 112)
    generator = torch.Generator().manual_seed(0)
    qkv, grad = (
        torch.randn(112, columns, generator=generator).to(dtype)
        for columns in (3 * 4 * head_dim, 4 * head_dim)
    )
    options = {"causal": True, "dropout_p": 0.2, "site": 3}
    results = []
    for device in ("cpu", "cuda"):
        there = packed.to(device)
        backend = "reference" if device == "cpu" else "compiled"
        with set_backend(backend):
            leaf = qkv.to(device).requires_grad_()
            out = self_attention_packed(leaf, 4, 4, there, rng=RNG.to(device), **options)
            out.backward(grad.to(device))
        results.append((out.detach().cpu(), leaf.grad.cpu()))
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@needs_gpu
@pytest.mark.parametrize(
    "head_dim, dtype, kind",
    [
        (64, torch.bfloat16, "tensor"),
        (64, torch.float16, "tensor"),
        (32, torch.bfloat16, "tensor"),
        (128, torch.bfloat16, "tensor"),
        (64, torch.bfloat16, "simple"),
        (8, torch.float32, "simple"),
    ],
)
def test_results_on_a_gpu_are_the_same_bits_each_time_and_in_a_graph(
    head_dim, dtype, kind, monkeypatch
):
    """Of tensor cores each launch, by length, and the kernels for longer sequences."""
    monkeypatch.setenv("TRANSFORMER_EXT_CUDA_ATTENTION", kind)
    lengths = [1, 31, 32, 33, 64, 65, 128, 129, 300]
    packed, width = Packed.from_lengths(lengths, 800).to("cuda"), 4 * head_dim
    generator, rng = torch.Generator().manual_seed(0), RNG.cuda()
    qkv, grad = (
        torch.randn(800, columns, generator=generator).to(dtype).cuda()
        for columns in (3 * width, width)
    )
    options = {"dropout_p": 0.1, "rng": rng, "site": 2}
    for causal in (False, True):
        assert_graph_safe(
            lambda causal=causal: run(
                lambda x: self_attention_packed(x, 4, 4, packed, causal, **options), [qkv], grad
            ),
            rng,
        )


def test_heads_too_wide_for_the_gpus_shared_memory_take_pytorch(monkeypatch):
    module = importlib.import_module("transformer_ext.ops.attention")
    monkeypatch.setattr(module, "use_compiled", lambda *_: True)
    for kilobytes, widest in ((64, 156), (99, 248), (227, 256)):
        gpu = SimpleNamespace(shared_memory_per_block_optin=kilobytes << 10)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, gpu=gpu: gpu)
        module._widest_on.cache_clear()
        query = SimpleNamespace(is_cuda=True, device="cuda:0")
        taken = [n for n in (64, 156, 157, 248, 249, 256, 257) if module._use_kernel(query, n)]
        assert max(taken) == widest
    module._widest_on.cache_clear()
