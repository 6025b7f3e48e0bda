"""Distances between outputs, and probes whose gradients have their curvature."""

import math

import pytest
import torch
from plain_host import PlainHost
from torch import nn

from cora_plugin import CoRa, CoRaError
from cora_plugin.adapters.errors import ModelError
from cora_plugin.objective import (
    KL,
    MSE,
    Bernoulli,
    Cosine,
    Custom,
    Weighted,
    measure,
)

SHAPES = {
    "kl": (3, 4),
    "dense kl": (3, 4, 2, 2),
    "kl, classes last": (3, 2, 4),
    "bernoulli": (3, 4),
    "mse": (3, 5),
    "cosine": (3, 4),
    "two": (3, 4),
}


def objective(name):
    return {
        "kl": KL(),
        "dense kl": KL(),
        "kl, classes last": KL(axis=-1),
        "bernoulli": Bernoulli(),
        "cosine": Cosine(),
        "mse": MSE(),
        "two": Weighted({"a": KL(), "b": MSE()}, {"b": 3.0}),
    }[name]


def outputs(name, seed=0):
    torch.manual_seed(seed)
    y = torch.randn(SHAPES[name], dtype=torch.float64)
    return {"a": y, "b": y.flip(1)} if name == "two" else {"": y}


@pytest.mark.parametrize("name", SHAPES)
def test_a_distance_is_zero_where_both_agree_and_positive_elsewhere(name):
    one, other = outputs(name), outputs(name, 1)
    assert objective(name).distance(one, one).abs().max() < 1e-12
    assert (objective(name).distance(one, other) > 0).all()
    assert objective(name).distance(one, other).shape == (3,)


@pytest.mark.parametrize("name", SHAPES)
def test_the_probe_has_the_curvature_of_the_distance(name):
    here, one = objective(name), {n: y[:1] for n, y in outputs(name).items()}
    flat = torch.cat([y.flatten() for y in one.values()])

    def apart(values):
        parts = values.split([y.numel() for y in one.values()])
        moved = {
            n: part.view(y.shape)
            for (n, y), part in zip(one.items(), parts, strict=True)
        }
        return here.distance(one, moved).sum()

    expected = torch.autograd.functional.hessian(apart, flat)
    random, total = torch.Generator().manual_seed(0), torch.zeros_like(expected)
    draws = 3000
    for _ in range(draws):
        values = {n: y.clone().requires_grad_() for n, y in one.items()}
        here.probe(values, random).backward()
        g = torch.cat([y.grad.flatten() for y in values.values()])
        total += torch.outer(g, g) / draws
    assert (total - expected).norm() < 0.12 * expected.norm()


def test_the_divergence_on_hand_made_numbers():
    p, q = torch.tensor([[math.log(3), 0.0]]), torch.tensor([[0.0, 0.0]])
    found = measure(KL(), {"": p}, {"": q})
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert found.value == found.kl == pytest.approx(expected, rel=1e-6)
    assert found.agreement == 1
    assert str(found) == f"KL {expected:.4g}, agreement 100.0%"
    squares = measure(MSE(), {"": p}, {"": q})
    assert squares.value == pytest.approx(math.log(3) ** 2 / 2)
    assert squares.agreement is None
    with pytest.raises(AttributeError, match=r"is mse; read \.value"):
        _ = squares.kl


def test_what_is_not_finite_is_infinitely_far_away():
    broken = torch.tensor([[torch.nan, 0.0]])
    assert measure(KL(), {"": torch.zeros(1, 2)}, {"": broken}).value == math.inf


def test_outputs_of_other_numbers_of_rows_are_told():
    both = {"scores": torch.randn(6), "boxes": torch.randn(4)}
    squares = Weighted({"scores": MSE(), "boxes": MSE()})
    with pytest.raises(CoRaError, match=r"'scores' 6, 'boxes' 4; wrap the model"):
        squares.distance(both, both)


def test_an_objective_that_does_not_fit_the_outputs_says_so():
    y = torch.zeros(2, 3)
    with pytest.raises(ModelError, match=r"2 tensors \(a, b\), not logits"):
        KL().distance({"a": y, "b": y}, {"a": y, "b": y})
    with pytest.raises(ModelError, match=r"tensor \[2\], not logits"):
        KL().distance({"": y[:, 0]}, {"": y[:, 0]})
    with pytest.raises(CoRaError, match="no output 'b'; it has 'a'"):
        Weighted({"b": KL()}).distance({"a": y}, {"a": y})
    with pytest.raises(CoRaError, match="'c' has a weight and no objective"):
        Weighted({"b": KL()}, {"c": 1.0})
    with pytest.raises(CoRaError, match="gave \\[\\] for 2 samples"):
        Custom(lambda a, b: (a - b).sum()).distance({"": y}, {"": y})


class Two(nn.Module):
    """A classifier whose second output is a position."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Conv2d(3, 16, 3, padding=1)
        self.classes = nn.Linear(16, 5)
        self.place = nn.Linear(16, 2)

    def forward(self, x):
        y = self.body(x).relu().mean((2, 3))
        return {"classes": self.classes(y), "place": self.place(y)}


@pytest.mark.parametrize(
    "objective",
    [
        Weighted({"classes": KL(), "place": MSE()}),
        Custom(lambda y, z: (y["place"] - z["place"]).square().sum(1)),
    ],
)
@pytest.mark.parametrize("search", ["spectral", "butterworth"])
def test_every_step_follows_the_objective(objective, search):
    torch.manual_seed(1)
    data = torch.randn(48, 3, 8, 8).split(16)
    host = PlainHost(Two(), bits=2)
    config = {
        "budget": 0.4,
        "search": search,
        "butterworth": {"iterations": 10},
        "refine": {"iterations": 4, "every": 2},
    }
    report = CoRa(config, objective).apply(host, data)
    assert report.after.objective == objective.name
    assert report.after.value < 0.5 * report.before.value
    assert f"{report.after.title} to float" in str(report)
