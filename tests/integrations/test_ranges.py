import pytest
import torch

from cora_plugin.adapters.errors import ConfigError
from cora_plugin.integrations.ranges import estimator, least_squares

BINS = 2048


def quantized(x, low, high, levels):
    step = (high - low) / (levels - 1)
    return ((x - low) / step).round().clamp(0, levels - 1) * step + low


def fitted(x, levels):
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    return least_squares(torch.histc(x, BINS, low, high).double(), low, high, levels)


def error(x, low, high, levels):
    return float((quantized(x, low, high, levels) - x).square().mean())


@pytest.mark.parametrize("levels", [4, 16, 256])
@pytest.mark.parametrize("kind", ["relu", "signed", "uneven"])
def test_no_range_of_another_size_is_nearer(kind, levels):
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    x = {"relu": x.relu(), "signed": x, "uneven": torch.where(x > 0, 3 * x, x)}[kind]
    low, high = fitted(x, levels)
    found = error(x, low, high, levels)
    for share in (0.8, 0.9, 1.1, 1.25):
        assert found < 1.02 * error(x, share * low, share * high, levels)
    covering = error(x, min(0.0, float(x.min())), float(x.max()), levels)
    assert found < covering * (0.8 if levels < 256 else 1.02)


def test_zero_is_a_level():
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) + 0.4
    low, high = fitted(x, 16)
    assert low < 0 < high
    zero = torch.zeros(1, dtype=torch.double)
    assert quantized(zero, low, high, 16).abs() < 1e-6


def test_values_of_one_sign_begin_or_end_at_zero():
    x = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) + 1
    assert fitted(x, 16)[0] == 0
    assert fitted(-x, 16)[1] == 0


def test_a_name_wins_over_the_width():
    known = {"few": 1, "many": 2, "other": 3}
    found = [estimator("auto", bits, known, "few", "many") for bits in (2, 5, 6, 8)]
    assert found == ["few", "few", "many", "many"]
    assert estimator("other", 4, known, "few", "many") == "other"
    match = "act_range: 'best' is unknown; use one of auto, few, many, other"
    with pytest.raises(ConfigError, match=match):
        estimator("best", 4, known, "few", "many")
