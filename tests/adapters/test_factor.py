import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cora_plugin.adapters import metric_root, truncate
from cora_plugin.adapters.errors import CoRaError
from cora_plugin.adapters.factor import Weighting, removed_error, weighted_error

DAMPING = 1e-6


def randn(*shape: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random, dtype=torch.float64)


def samples(groups: int, size: int, seed: int = 0) -> Tensor:
    """Correlated inputs of very different sizes, with a mean, [g, p, k]."""
    mixing = randn(groups, size, size, seed=seed)
    spread = torch.logspace(-2, 1, size, dtype=torch.float64)
    return randn(groups, 3 * size, size, seed=seed + 1) @ mixing * spread + 0.3


def second_moment(u: Tensor) -> Tensor:
    """[g, p, k] to [g, 1, k, k]."""
    return (u.mT @ u / u.shape[1])[:, None]


def square_root(metric: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The symmetric root of the damped metric [g, k, k], and its inverse."""
    size = metric.shape[-1]
    mean = metric.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    values, vectors = torch.linalg.eigh(metric + damping * mean * torch.eye(size))
    root = vectors * values.sqrt()[:, None] @ vectors.mT
    inverse = vectors / values.sqrt()[:, None] @ vectors.mT
    return root, inverse


def by_explicit_roots(
    residual: Tensor, rank: int, inputs: Tensor, outputs: Tensor, damping: float
) -> Tensor:
    """`L⁻¹ [L E S]_r S⁻¹` with symmetric square roots, one group after another."""
    s, s_inverse = square_root(inputs, damping)
    l, l_inverse = square_root(outputs, damping)  # noqa: E741
    best = []
    for g, e in enumerate(residual):
        u, sigma, vh = torch.linalg.svd(l[g] @ e @ s[g])
        kept = sum(sigma[i] * torch.outer(u[:, i], vh[i]) for i in range(rank))
        best.append(l_inverse[g] @ kept @ s_inverse[g])
    return torch.stack(best)


@settings(deadline=None, max_examples=40)
@given(
    groups=st.integers(1, 3),
    rows=st.integers(2, 9),
    columns=st.integers(2, 9),
    seed=st.integers(0, 1000),
    damping=st.sampled_from([0.0, 1e-6, 1e-2]),
    data=st.data(),
)
def test_truncation_is_the_formula_with_explicit_square_roots(
    groups, rows, columns, seed, damping, data
):
    rank = data.draw(st.integers(1, min(rows, columns)))
    residual = randn(groups, rows, columns, seed=seed)
    inputs = second_moment(samples(groups, columns, seed=seed + 1))
    outputs = second_moment(samples(groups, rows, seed=seed + 9))
    weighting = Weighting(
        metric_root(inputs, damping, "conv"), metric_root(outputs, damping, "conv")
    )
    a, b = truncate(residual, rank, weighting)
    expected = by_explicit_roots(residual, rank, inputs[:, 0], outputs[:, 0], damping)
    # Inverse roots of metrics that are nearly singular magnify rounding.
    worst = 1e-15
    for metric in (inputs[:, 0], outputs[:, 0]):
        mean = metric.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        damped = metric + damping * mean * torch.eye(metric.shape[-1])
        worst *= float(torch.linalg.cond(damped).max())
    atol = max(1e-7, 100 * worst)
    torch.testing.assert_close(b @ a, expected, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("seed", range(5))
def test_qera_exact_has_the_least_output_error_of_all_metrics(rank, seed):
    residual = randn(2, 10, 12, seed=seed)
    u = samples(2, 12, seed=seed)
    moment = second_moment(u)
    metrics = {
        "svd": Weighting(),
        "lqer": Weighting(metric_root(u.abs().mean(1).square(), DAMPING, "conv")),
        "qera-approx": Weighting(metric_root(u.square().mean(1), DAMPING, "conv")),
        "qera-exact": Weighting(metric_root(moment, DAMPING, "conv")),
    }
    errors = {}
    for name, metric in metrics.items():
        a, b = truncate(residual, rank, metric)
        # Over the inputs themselves, not by the library's own error.
        errors[name] = float(((residual - b @ a) @ u.mT).square().sum())
    best = errors.pop("qera-exact")
    assert all(best < error for error in errors.values()), (best, errors)


@pytest.mark.parametrize(("rows", "columns"), [(5, 9), (9, 5), (6, 6)])
def test_removed_error_holds_the_squared_singular_values(rows, columns):
    residual = randn(2, rows, columns)
    inputs, outputs = (second_moment(samples(2, n, seed=n)) for n in (columns, rows))
    weighting = Weighting(
        metric_root(inputs, DAMPING, "conv"), metric_root(outputs, DAMPING, "conv")
    )
    s, _ = square_root(inputs[:, 0], DAMPING)
    l, _ = square_root(outputs[:, 0], DAMPING)  # noqa: E741
    expected = torch.linalg.svdvals(l @ residual @ s).square().sum(0)
    removed = removed_error(residual, weighting)
    torch.testing.assert_close(removed, expected, rtol=1e-8, atol=1e-8)
    assert float(removed.sum()) == pytest.approx(weighted_error(residual, weighting))


@pytest.mark.parametrize("rank", [0, 1, 4, 5])
def test_an_adapter_leaves_the_error_that_its_ranks_did_not_remove(rank):
    residual = randn(2, 5, 7)
    weighting = Weighting(metric_root(second_moment(samples(2, 7)), DAMPING, "conv"))
    a, b = truncate(residual, rank, weighting)
    left = weighted_error(residual - b @ a, weighting)
    removed = float(removed_error(residual, weighting)[:rank].sum())
    total = weighted_error(residual, weighting)
    assert left == pytest.approx(total - removed, rel=1e-8, abs=1e-8 * total)


def test_full_rank_gives_the_residual_back_in_any_metric():
    residual = randn(3, 6, 4)
    for metric in (
        None,
        metric_root(samples(3, 4).square().mean(1), DAMPING, "conv"),
        metric_root(second_moment(samples(3, 4)), DAMPING, "conv"),
    ):
        a, b = truncate(residual, 4, Weighting(metric))
        torch.testing.assert_close(b @ a, residual)


def test_a_metric_that_float32_sums_made_indefinite_still_works():
    # More inputs than samples, a large mean, many small batches: as in wide layers.
    u = (samples(1, 96, seed=3)[:, :60] + 40).float()
    total = torch.zeros(96, 96)
    for row in u[0]:
        total += torch.outer(row, row)
    moment = total.double()[None, None] / 60
    assert torch.linalg.eigvalsh(moment)[0, 0, 0] < 0
    for damping in (0.0, 1e-12, 1e-4):
        root = metric_root(moment, damping, "conv")
        factor = root.factor[0, 0]
        shift = damping * moment.diagonal(dim1=-2, dim2=-1).mean() * torch.eye(96)
        torch.testing.assert_close(
            factor @ factor.T, moment[0, 0] + shift, rtol=1e-5, atol=1e-2
        )
        assert torch.equal(factor, factor.tril())
        residual = randn(1, 8, 96)
        a, b = truncate(residual, 3, Weighting(root))
        plain_a, plain_b = truncate(residual, 3, Weighting())
        seen = u.double().mT
        error = ((residual - b @ a) @ seen).norm()
        assert error < ((residual - plain_b @ plain_a) @ seen).norm()


def test_dead_inputs_leave_the_plain_truncation():
    residual = randn(1, 6, 8)
    expected = torch.matmul(*reversed(truncate(residual, 3, Weighting())))
    for metric in (torch.zeros(1, 8), torch.zeros(1, 1, 8, 8), torch.zeros(1, 2, 4, 4)):
        a, b = truncate(residual, 3, Weighting(metric_root(metric, 1e-4, "conv")))
        torch.testing.assert_close(b @ a, expected)


def test_a_dead_group_does_not_disturb_the_live_one():
    residual = randn(2, 6, 8)
    moment = second_moment(samples(2, 8))
    alone = truncate(residual[1:], 2, Weighting(metric_root(moment[1:], 1e-4, "c")))
    moment[0] = 0
    a, b = truncate(residual, 2, Weighting(metric_root(moment, 1e-4, "conv")))
    assert torch.isfinite(a).all() and torch.isfinite(b).all()
    torch.testing.assert_close((b @ a)[1:], alone[1] @ alone[0])


@pytest.mark.parametrize("damping", [0.0, 1e-4])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_dead_inputs_among_live_ones_give_bounded_factors(damping, whole, seed):
    residual = randn(1, 20, 12, seed=seed)
    u = samples(1, 12, seed=seed)
    u[..., 3:6] = 0
    metric = second_moment(u) if whole else u.square().mean(1)
    a, b = truncate(residual, 12, Weighting(metric_root(metric, damping, "conv")))
    assert (b @ a).abs().max() < 100 * residual.abs().max()


def test_blocks_are_the_dense_metric_when_it_is_block_diagonal():
    residual = randn(2, 5, 12)
    blocks = torch.stack([second_moment(samples(2, 4, seed=s))[:, 0] for s in range(3)])
    blocks = blocks.transpose(0, 1)  # [g, b, k/b, k/b]
    dense = torch.stack([torch.block_diag(*group) for group in blocks])[:, None]
    a, b = truncate(residual, 3, Weighting(metric_root(blocks, 1e-3, "conv")))
    a_dense, b_dense = truncate(residual, 3, Weighting(metric_root(dense, 1e-3, "c")))
    torch.testing.assert_close(b @ a, b_dense @ a_dense)


def test_a_diagonal_metric_is_the_dense_one_with_that_diagonal():
    residual = randn(2, 5, 6)
    diagonal = samples(2, 6).square().mean(1)
    dense = torch.diag_embed(diagonal)[:, None]
    a, b = truncate(residual, 3, Weighting(metric_root(diagonal, 1e-3, "conv")))
    a_dense, b_dense = truncate(residual, 3, Weighting(metric_root(dense, 1e-3, "c")))
    torch.testing.assert_close(b @ a, b_dense @ a_dense)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_the_layer_name(value):
    residual = randn(1, 3, 4)
    residual[0, 1, 2] = value
    with pytest.raises(CoRaError, match=r"stem\.conv1.*NaN or inf"):
        truncate(residual, 2, Weighting(), "stem.conv1")
    for shape in ((1, 4), (1, 1, 4, 4)):
        metric = torch.ones(shape)
        metric[..., 0] = value
        with pytest.raises(CoRaError, match=r"stem\.conv1.*not finite"):
            metric_root(metric, 1e-4, "stem.conv1")


def test_a_negative_second_moment_is_refused():
    with pytest.raises(CoRaError, match=r"stem\.conv1.*below zero"):
        metric_root(torch.tensor([[1.0, -1.0]]), 1e-4, "stem.conv1")


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_outside_the_matrix_is_refused_with_the_way_out(rank):
    with pytest.raises(CoRaError, match=rf"stem: rank {rank} .*pass rank <= 3"):
        truncate(randn(1, 3, 7), rank, Weighting(), "stem")
