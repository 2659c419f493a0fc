import math

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

from transformer_ext.ops.embedding import embedding, embedding_reference, sinusoidal_positions

DTYPES = (torch.float32, torch.bfloat16)
RNG = torch.tensor([-5, 3, 1])


def case(shape, columns, words=23, places=19):
    """ids, weight, positions, table of positions, gradient of the result."""
    generator = torch.Generator().manual_seed(columns)
    return (
        torch.randint(words, shape, generator=generator),
        torch.randn(words, columns, generator=generator),
        torch.randint(places, shape, generator=generator, dtype=torch.int32),
        torch.randn(places, columns, generator=generator),
        torch.randn(*shape, columns, generator=generator),
    )


def run(face, ids, weight, positions, table, grad, dtype, **options):
    weight = weight.detach().requires_grad_()
    inputs = [weight]
    if table is not None:
        table = table.detach().requires_grad_()
        inputs.append(table)
    y = face(ids, weight, positions=positions, position_table=table, dtype=dtype, **options)
    return y.detach(), *torch.autograd.grad(y, inputs, grad.to(y.dtype))


@needs_compiled
@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("columns", [1, 7, 16, 64, 65, 200, 515])
def test_precision_against_float64(columns, learned, p, device, dtype):
    options = {"scale": math.sqrt(columns), "dropout_p": p, "rng": RNG, "site": 7}
    for shape in ((), (5,), (3, 29), (211,)):
        ids, weight, positions, table, grad = case(shape, columns)
        grad = grad.to(dtype)
        if not learned:
            positions = table = None
        exact = run(
            embedding_reference,
            ids,
            weight.double(),
            positions,
            None if table is None else table.double(),
            grad,
            torch.float64,
            **options,
        )
        peer = run(embedding_reference, ids, weight, positions, table, grad, dtype, **options)
        with set_backend("compiled"):
            got = run(
                embedding,
                *moved((ids, weight, positions, table, grad), device),
                dtype,
                **moved(options, device),
            )
        assert_all_as_precise(moved(got, "cpu"), exact, peer)


@needs_gpu
def test_gradients_on_a_gpu_are_the_same_bits_each_time_and_in_a_graph():
    ids, weight, positions, table, grad = moved(case((3001,), 515, words=70000), "cuda")
    ids = ids % 300 * (ids % 2) + ids % 70000 * (1 - ids % 2)  # a few frequent ids, as in text
    options = {"dropout_p": 0.1, "rng": RNG.cuda(), "dtype": torch.bfloat16}
    assert_graph_safe(
        lambda: run(embedding, ids, weight, positions, table, grad, **options), options["rng"]
    )


@needs_gpu
def test_an_id_outside_of_the_table_gives_nan_on_a_gpu():
    weight = torch.ones(3, 8, device="cuda")
    ids = torch.tensor([0, 3, -1, 2], device="cuda")
    with set_backend("compiled"):
        y, grad = run(embedding, ids, weight, None, None, torch.ones(4, 8).cuda(), torch.float32)
    assert y.isnan().all(1).tolist() == [False, True, True, False]
    assert grad[:, 0].tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_count_along_the_last_dimension_if_not_given(backend):
    ids, weight, _, table, _ = case((3, 11), 8)
    with set_backend(backend):
        expected = embedding(
            ids, weight, positions=torch.arange(11).expand(3, 11), position_table=table
        )
        assert torch.equal(embedding(ids, weight, position_table=table), expected)
        assert torch.equal(expected, weight[ids] + table[:11])


@pytest.mark.parametrize("backend", BACKENDS)
def test_int32_ids_and_strided_input(backend):
    ids, weight, positions, table, grad = case((6, 11), 24)
    options = {"dropout_p": 0.3, "rng": RNG, "dtype": torch.float32}
    with set_backend(backend):
        expected = run(embedding, ids, weight, positions, table, grad, **options)
        narrow = run(embedding, ids.int(), weight, positions.long(), table, grad, **options)
        strided = run(
            embedding,
            ids.t().contiguous().t(),
            weight.t().contiguous().t(),
            positions.t().contiguous().t(),
            table.t().contiguous().t(),
            grad.permute(2, 0, 1).contiguous().permute(1, 2, 0),
            **options,
        )
    for a, b, c in zip(expected, narrow, strided, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_the_table_that_no_id_names_is_neither_read_nor_given_a_gradient(backend):
    ids, weight, _, _, grad = case((50,), 40)
    unused = torch.ones(23, dtype=torch.bool)
    unused[ids] = False
    unused[5] = True
    ids[ids == 5] = 6
    weight[unused] = torch.nan
    with set_backend(backend):
        y, grad_weight = run(embedding, ids, weight, None, None, grad, torch.float32)
    assert not y.isnan().any()
    assert (grad_weight[unused] == 0).all() and not grad_weight.isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_slack_rows_with_gradient_zero_contribute_nothing(backend):
    ids, weight, positions, table, grad = case((64,), 40)
    grad[50:] = 0
    options = {"dropout_p": 0.3, "rng": RNG, "dtype": torch.float32}
    with set_backend(backend):
        slack = run(embedding, ids, weight, positions, table, grad, **options)
        exact = run(embedding, ids[:50], weight, positions[:50], table, grad[:50], **options)
    for a, b in zip(slack[1:], exact[1:], strict=True):
        torch.testing.assert_close(a, b)


@needs_compiled
def test_gradient_is_summed_in_the_order_of_the_tokens():
    weight = torch.zeros(3, 1)
    grad = torch.tensor([1e8, 1.0, -1e8, 1.0])[:, None]
    ids = torch.tensor([1, 1, 1, 1])
    with set_backend("compiled"):
        _, grad_weight = run(embedding, ids, weight, None, None, grad, torch.float32)
    assert grad_weight[1].item() == ((1e8 + 0) - 1e8) + 1.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    with set_backend(backend):
        for shape in ((0,), (3, 0)):
            ids, weight, positions, table, grad = case(shape, 6)
            y, grad_weight, grad_table = run(
                embedding, ids, weight, positions, table, grad, torch.float32
            )
            assert y.shape == (*shape, 6)
            assert (grad_weight == 0).all() and (grad_table == 0).all()


@needs_compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_thread_count(dtype):
    ids, weight, positions, table, grad = case((700,), 515, words=300)
    ids = (ids.double() ** 2 / 300).long()  # a few frequent ids, as in text
    results = []
    for count in (1, 2, 4):
        with threads(count), set_backend("compiled"):
            results.append(
                run(
                    embedding,
                    ids,
                    weight,
                    positions,
                    table,
                    grad.to(dtype),
                    dtype,
                    dropout_p=0.1,
                    rng=RNG,
                )
            )
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert torch.equal(a, b)


def test_reference_gradient():
    ids, weight, positions, table, _ = case((2, 5), 4, words=6, places=5)
    positions = positions % 5
    assert torch.autograd.gradcheck(
        lambda w, t: embedding_reference(
            ids, w, scale=2.0, positions=positions, position_table=t, dropout_p=0.3, rng=RNG
        ),
        (weight.double().requires_grad_(), table.double().requires_grad_()),
    )


@needs_compiled
def test_raw_ops_are_sound():
    ops = torch.ops.transformer_ext
    ids, weight, positions, table, grad = case((3, 5), 9)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for place, narrow in (((positions, table), True), ((None, None), False)):
        torch.library.opcheck(
            ops.embedding_forward.default,
            (ids, weight, 2.0, *place, 0.3, RNG, 4, int(narrow)),
            test_utils=checks,
        )
    torch.library.opcheck(
        ops.embedding_backward.default, (grad, ids, 23, 2.0, 0.3, RNG, 4), test_utils=checks
    )


@needs_compiled
def test_compiles_to_one_graph():
    ids, weight, positions, table, _ = case((3, 5), 40)
    inputs = [weight.requires_grad_(), table.requires_grad_()]

    def loss(weight, table, rng):
        y = embedding(
            ids, weight, positions=positions, position_table=table, dropout_p=0.1, rng=rng
        )
        return (y * 2).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*inputs, RNG), inputs)
    got = torch.autograd.grad(compiled(*inputs, RNG), inputs)
    ids[1, 2] = 23
    with pytest.raises(IndexError, match="^ids: got 23 at position 7"):
        compiled(*inputs, RNG)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@needs_compiled
@pytest.mark.parametrize("bad", [-1, 23])
def test_an_id_outside_the_table_is_an_error(bad):
    ids, weight, positions, table, _ = case((7,), 5)
    ids[3] = bad
    with set_backend("compiled"):
        with pytest.raises(IndexError, match=f"^ids: got {bad} at position 3, expected 0 to 22"):
            embedding(ids, weight)
        positions[2] = 19
        with pytest.raises(IndexError, match="^positions: got 19 at position 2"):
            embedding(ids.clamp(0, 22), weight, positions=positions, position_table=table)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ids": torch.zeros(3)}, TypeError, "ids: expected int64 or int32, got torch.float32"),
        ({"weight": torch.zeros(3)}, ValueError, "weight: expected 2 dimensions"),
        ({"positions": torch.zeros(4).int()}, ValueError, r"positions: expected the shape of ids"),
        ({"positions": torch.zeros(3)}, TypeError, "positions: expected int32 or int64"),
        ({"position_table": torch.zeros(3, 4)}, ValueError, r"expected \[positions, 5\]"),
        ({"position_table": None}, ValueError, "positions: given without a position_table"),
    ],
)
def test_wrong_arguments_are_named(change, error, message, backend):
    arguments = {
        "ids": torch.zeros(3, dtype=torch.int64),
        "weight": torch.zeros(4, 5),
        "positions": torch.zeros(3, dtype=torch.int32),
        "position_table": torch.zeros(6, 5),
    }
    with set_backend(backend), pytest.raises(error, match=message):
        embedding(**{**arguments, **change})


def test_sinusoids_are_those_of_the_paper():
    table = sinusoidal_positions(50, 12)
    halves = sinusoidal_positions(50, 12, halves=True)
    assert table.shape == (50, 12) and table.dtype == torch.float32
    for position in (0, 1, 49):
        for i in range(6):
            angle = position / 10000 ** (2 * i / 12)
            assert table[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-7)
            assert table[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-7)
    assert torch.equal(halves, torch.cat([table[:, 0::2], table[:, 1::2]], dim=1))
    assert torch.equal(sinusoidal_positions(9, 7)[:, :6:2], sinusoidal_positions(9, 7, True)[:, :3])
    with pytest.raises(ValueError, match="got -1, 4"):
        sinusoidal_positions(-1, 4)
