import json
from dataclasses import asdict, replace

import pytest
import torch

from cora_plugin.adapters import Operation
from cora_plugin.adapters.fingerprint import Fingerprint, _distance, _project

CONV = Operation(2, (1, 1), ((1, 1), (1, 1)), "zeros", (1, 1))


def integers(rows=32, bits=4, seed=0):
    random = torch.Generator().manual_seed(seed)
    top = 2 ** (bits - 1) - 1
    q = (torch.randn(rows, 16, 3, 3, generator=random) * top / 3).round()
    q = q.clamp(-top, top)
    q[:, 0, 0, 0] = top
    return q


def scales(rows=32):
    return torch.rand(rows, 1, 1, 1, generator=torch.Generator().manual_seed(9)) + 0.1


def of(q, scale=None, bits=4, operation=CONV):
    return Fingerprint.of(q * (scales() if scale is None else scale), bits, operation)


def test_a_weight_does_not_differ_from_itself():
    q = integers()
    assert of(q) == of(q.clone())
    assert of(q).difference(of(q), q.numel()) is None


def test_json_brings_it_back():
    made = of(integers())
    read = Fingerprint.read(json.loads(json.dumps(asdict(made))))
    assert made.difference(read, 4608) is None
    assert read.difference(made, 4608) is None


@pytest.mark.parametrize("flips", [1, 2])
def test_last_bits_and_a_tie_may_fall_otherwise(flips):
    q = integers()
    scale = scales()
    other = q.clone()
    for flip in range(flips):
        other[flip, 3, 1, 1] += 1 if other[flip, 3, 1, 1] < 0 else -1
    nearby = torch.nextafter(scale, torch.full_like(scale, 2.0))
    assert of(q, scale).difference(of(other, nearby), q.numel()) is None


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("share", [0.05, 0.3])
def test_other_rounding_is_another_weight(bits, share):
    """A twentieth of the integers is what another calibration of GPTQ would move."""
    q = integers(bits=bits)
    random = torch.Generator().manual_seed(4)
    moved = torch.rand(q.shape, generator=random) < share
    moved[:, 0, 0, 0] = False
    step = torch.where(q > 0, -1.0, 1.0)
    other = torch.where(moved, q + step, q)
    difference = of(q, bits=bits).difference(of(other, bits=bits), q.numel())
    assert "integers are others" in difference


def test_an_estimate_tells_how_many_integers_are_others():
    q = integers(rows=256)
    scale = scales(256)
    moved = torch.rand(q.shape, generator=torch.Generator().manual_seed(4)) < 0.2
    moved[:, 0, 0, 0] = False
    other = torch.where(moved, q - q.sign() + (q == 0), q)
    difference = of(q, scale).difference(of(other, scale), q.numel())
    share = float(difference.split("about ")[1].split("%")[0])
    assert 7 < share < 45


def test_other_scales_are_another_weight():
    q = integers()
    for factor in (1.05, torch.linspace(0.9, 1.1, 32).view(-1, 1, 1, 1)):
        difference = of(q).difference(of(q, scales() * factor), q.numel())
        assert difference == "a weight of other scales"


def test_the_first_difference_is_named():
    made = of(integers())
    assert made.difference(of(integers(), bits=8), 9) == (
        "a weight of 4 bits, not of 8"
    )
    strided = of(integers(), operation=replace(CONV, stride=(2, 2)))
    assert made.difference(strided, 9) == "stride [1, 1], not [2, 2]"


def test_channels_of_zeros_have_a_fingerprint():
    q = integers()
    q[3] = 0
    assert of(q).difference(of(q), q.numel()) is None
    assert of(torch.zeros_like(q)).difference(of(q), q.numel()) is not None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bits", "four"),
        ("operation", 3),
        ("steps", [0.0] * 7),
        ("steps", [float("nan")] * 8),
        ("ranges", None),
    ],
)
def test_fields_of_something_else_are_refused(field, value):
    fields = asdict(of(integers())) | {field: value}
    with pytest.raises((TypeError, ValueError)):
        Fingerprint.read(fields)


def test_projections_keep_distances():
    """Over many pairs, the estimate is right on average and seldom far off."""
    ratios = []
    for seed in range(40):
        one, other = torch.randn(2, 5000, generator=torch.Generator().manual_seed(seed))
        near = one + 0.01 * other
        squared = float((one - near).square().sum())
        ratios.append(_distance(_project(one), _project(near)) / squared)
    assert 0.8 < sum(ratios) / len(ratios) < 1.2
    assert min(ratios) > 0.1 and max(ratios) < 4
