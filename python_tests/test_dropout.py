import pytest
import torch
from kernel_testing import BACKENDS, needs_compiled, set_backend, threads

from transformer_ext import ops
from transformer_ext.ops.dropout import (
    dropout,
    dropout_reference,
    dropout_scale,
    dropout_threshold,
    keep_mask,
    philox4x32,
)
from transformer_ext.packed import Packed

DTYPES = (torch.float32, torch.bfloat16)
RNGS = [(0, 0, 0), (-5, 3, 1), (2**62 + 12345, 2**33 + 7, 65535), (-(2**63), -1, 1 << 20)]


def words(*values):
    return tuple(torch.tensor(value) for value in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # The known answers that the authors of Random123 publish for philox4x32 with 7 rounds.
        ((0,) * 4, (0,) * 2, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
        ),
    ],
)
def test_known_answers(counter, key, expected):
    assert tuple(int(w) for w in philox4x32(words(*counter), words(*key))) == expected


@pytest.mark.parametrize("rng", RNGS)
def test_which_bits_belong_to_which_element(rng):
    site, p, columns = 300, 0.3, 21
    rows = torch.tensor([[0, 1, 77], [2**31, 2**32 + 5, 2**40 - 1]])
    seed, step, microstep = rng
    low = 2**32 - 1
    mask = keep_mask(torch.tensor(rng), site, rows, columns, p)
    assert mask.shape == (2, 3, columns)
    for index, row in enumerate(rows.flatten().tolist()):
        for column in range(columns):
            counter = (column // 8, row & low, step & low, (site + (microstep << 16)) & low)
            output = philox4x32(words(*counter), words(seed & low, (seed >> 32) & low))
            word = int(output[column % 8 // 2])
            value = word >> 16 if column % 2 else word & 0xFFFF
            assert mask.view(-1, columns)[index, column] == (value >= round(p * 65536))


def test_rows_are_counted_from_zero():
    rng = torch.tensor([1, 2, 3])
    assert torch.equal(
        keep_mask(rng, 4, 50, 33, 0.5),
        keep_mask(rng, 4, torch.arange(50, dtype=torch.int32), 33, 0.5),
    )


@needs_compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [1 / 65536, 0.1, 0.5, 0.9, 65535 / 65536, 1.0])
@pytest.mark.parametrize("columns", [1, 3, 8, 16, 63, 64, 65, 127, 300])
def test_kernel_and_twin_draw_the_same_bits(columns, p, dtype):
    for site, rng in enumerate(RNGS):
        x = torch.randn(11, columns).to(dtype)
        with set_backend("compiled"):
            got = dropout(x, p, torch.tensor(rng), site)
        assert torch.equal(got, dropout_reference(x, p, torch.tensor(rng), site))


@needs_compiled
def test_same_bits_for_any_thread_count():
    x, rng = torch.randn(300, 515), torch.tensor([9, 8, 7])
    results = []
    for count in (1, 2, 4):
        with threads(count), set_backend("compiled"):
            results.append(dropout(x, 0.2, rng, 5))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.93])
def test_expectation_is_the_input(p, backend):
    count = 1 << 20
    with set_backend(backend):
        y = dropout(torch.ones(1024, 1024), p, torch.tensor([42, 0, 0]), 1)
    kept = (y != 0).sum().item() / count
    deviation = (p * (1 - p) / count) ** 0.5
    assert abs(kept - (1 - dropout_threshold(p) / 65536)) < 5 * deviation
    assert y.mean().item() == pytest.approx(1, abs=5 * deviation / (1 - p))
    # The mean over rows and over columns too: no lane is favoured.
    for dim in (0, 1):
        assert (y.mean(dim) - 1).abs().max() < 6 * (p / (1 - p) / 1024) ** 0.5
    assert y.max().item() == pytest.approx(dropout_scale(p), rel=1e-6)


def test_seed_step_microstep_site_and_row_each_draw_anew():
    base = {"rng": (1, 2, 3), "site": 4, "rows": torch.arange(64)}
    variants = [
        base,
        {**base, "rng": (2, 2, 3)},
        {**base, "rng": (1 + 2**32, 2, 3)},
        {**base, "rng": (1, 3, 3)},
        {**base, "rng": (1, 2, 4)},
        {**base, "site": 5},
        {**base, "rows": torch.arange(64, 128)},
    ]
    masks = [keep_mask(torch.tensor(v["rng"]), v["site"], v["rows"], 256, 0.5) for v in variants]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs((a == b).double().mean().item() - 0.5) < 5 * 0.5 / 128


@pytest.mark.parametrize("backend", BACKENDS)
def test_off(backend):
    x = torch.randn(3, 4)
    with set_backend(backend):
        assert dropout(x, 0.0, None) is x and dropout(x, 1e-6, None) is x
        assert dropout(x, 1e-6, torch.tensor([1, 2, 3])) is x
    assert keep_mask(torch.tensor([1, 2, 3]), 0, 2, 5, 0.0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_op_takes_a_missing_state_for_no_dropout(backend):
    x = torch.ones(4, 6)
    packed = Packed.from_lengths([3, 1])
    calls = [
        lambda **rest: ops.attention(*[x.view(2, 1, 2, 6)] * 3, **rest),
        lambda **rest: ops.self_attention_packed(x, 1, 1, packed, **rest),
        lambda **rest: ops.residual_dropout(x, None, **rest),
        lambda **rest: ops.residual_norm(x, x, **rest),
        lambda **rest: ops.activation(x, **rest),
        lambda **rest: ops.embedding(torch.tensor([1, 2]), x, **rest),
    ]
    with set_backend(backend):
        for call in calls:
            with pytest.raises(ValueError, match=r"^rng: expected an int64 .* of 0\.5, got None$"):
                call(dropout_p=0.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_is_dropped_and_scaled_alike(backend):
    rng = torch.tensor([1, 2, 3])
    x = torch.randn(2, 5, 33, requires_grad=True)
    grad = torch.randn(33, 5, 2).permute(2, 1, 0)
    with set_backend(backend):
        y = dropout(x, 0.4, rng, 2)
        (grad_x,) = torch.autograd.grad(y, x, grad)
    mask = keep_mask(rng, 2, 10, 33, 0.4).view(2, 5, 33)
    scale = torch.tensor(dropout_scale(0.4))
    assert torch.equal(grad_x, torch.where(mask, grad * scale, 0.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_dropped_is_zero_even_if_it_is_nan(backend):
    rng = torch.tensor([1, 2, 3])
    with set_backend(backend):
        y = dropout(torch.full((4, 100), torch.nan), 0.5, rng)
    mask = keep_mask(rng, 0, 4, 100, 0.5)
    assert (y[~mask] == 0).all() and y[mask].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    rng = torch.tensor([1, 2, 3])
    with set_backend(backend):
        for shape in ((0, 5), (3, 0), (0,)):
            assert dropout(torch.zeros(shape), 0.5, rng).shape == shape


@pytest.mark.parametrize(
    ("p", "rng", "site", "message"),
    [
        (-0.1, torch.tensor([1, 2, 3]), 0, "from 0 to 1, got -0.1"),
        (1.1, torch.tensor([1, 2, 3]), 0, "from 0 to 1, got 1.1"),
        ("a", torch.tensor([1, 2, 3]), 0, "from 0 to 1, got 'a'"),
        (0.5, [1, 2, 3], 0, "rng: expected a tensor, got list"),
        (0.5, torch.tensor([1, 2]), 0, "rng: expected an int64 tensor of shape"),
        (0.5, torch.tensor([1.0, 2, 3]), 0, "rng: expected an int64 tensor of shape"),
        (0.5, torch.tensor([1, 2, 3]), -1, "site: expected a number from 0 to 65535, got -1"),
        (0.5, torch.tensor([1, 2, 3]), 65536, "site: expected a number from 0 to 65535"),
    ],
)
def test_wrong_arguments_are_named(p, rng, site, message):
    with pytest.raises((TypeError, ValueError), match=message):
        dropout(torch.zeros(2, 3), p, rng, site)


@needs_compiled
def test_compiles_to_one_graph():
    rng = torch.tensor([1, 2, 3])
    x = torch.randn(4, 40, requires_grad=True)

    def loss(x, rng):
        return (dropout(x, 0.3, rng, 1) * 2).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(loss(x, rng), x)
    (got,) = torch.autograd.grad(compiled(x, rng), x)
    assert torch.equal(got, expected)
    # The mask follows the content of rng, not its value at the time of compilation.
    rng += 1
    (expected,) = torch.autograd.grad(loss(x, rng), x)
    (got,) = torch.autograd.grad(compiled(x, rng), x)
    assert torch.equal(got, expected)
