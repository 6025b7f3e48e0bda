"""Steps are judged by paired differences, whose standard error is told."""

import pytest
import torch
from plain_host import PlainHost
from small_net import batches, net

from cora_plugin import CoRa
from cora_plugin.guard import standard_error
from cora_plugin.objective import KL, distances


def test_the_standard_error_on_hand_made_numbers():
    differences = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
    expected = (14 / 3 / 4) ** 0.5  # variance 14/3 of 4 samples
    assert standard_error(differences) == pytest.approx(expected)
    assert standard_error(differences[:1]) is None
    assert standard_error(torch.tensor([1.0, torch.inf])) is None


def test_a_step_tells_its_difference_with_the_error_of_pairs():
    host, data = PlainHost(net()), batches()
    config = {"budget": 0.3, "metric": "svd", "bias_correction": "off"}
    report = CoRa(config).apply(host, data)
    (step,) = report.steps
    held_out = torch.stack([x for i, x in enumerate(torch.cat(data)) if i % 5 == 4])
    with torch.no_grad():
        reference = {"": host.float_net(held_out)}
        after = distances(KL(), reference, host.run(held_out))
        with host.acting():
            before = distances(KL(), reference, host.run(held_out))
    pairs = after - before
    assert step.difference == pytest.approx(float(pairs.mean()), rel=1e-4)
    assert step.error == pytest.approx(float(pairs.std() / len(pairs) ** 0.5), rel=1e-4)
    assert f"({step.difference:+.2g} ± {step.error:.1g})" in str(report)
