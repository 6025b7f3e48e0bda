"""Activation ranges of least squared error, which NNCF has for 8 bits alone."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch
from nncf import Dataset
from nncf.common.graph.graph import NNCFGraph
from nncf.common.tensor_statistics.statistic_point import StatisticPointsContainer
from nncf.torch.quantization.layers import AsymmetricQuantizer, BaseQuantizer
from torch import Tensor, nn

from cora_plugin.integrations.nncf.dataset import ImageDataset
from cora_plugin.integrations.nncf.private import (
    maybe_get_values_from_torch_return_type,
)
from cora_plugin.integrations.nncf.step import TorchStep
from cora_plugin.integrations.ranges import least_squares
from cora_plugin.integrations.scopes import evaluation, replaced
from cora_plugin.outputs import run

BINS = 2048
"""Bins of an activation's histogram."""

See = Callable[[AsymmetricQuantizer, Tensor], None]


class LeastSquaresRanges(TorchStep):
    """Ranges by histograms of what the float model computes, at each quantizer's width.

    Right after NNCF placed its quantizers, and their widths are set. Those of one range
    are changed; quantizers with a range a channel, of inputs of depthwise convolutions,
    keep NNCF's.

    Args:
        subset_size: Number of the dataset's items that are used at most.
    """

    dataset: Dataset | None = None
    """What the pipeline hands on, for NNCF passes no dataset to `apply`."""

    def __init__(self, subset_size: int | None = None) -> None:
        self.subset_size = subset_size

    @torch.no_grad()
    def apply(
        self,
        model: Any,
        graph: NNCFGraph,
        statistic_points: StatisticPointsContainer | None = None,
        dataset: Dataset | None = None,
    ) -> Any:
        """Change the ranges of NNCF's wrapped model in place; walks the data twice."""
        data = ImageDataset(dataset or self.dataset)
        ends: dict[AsymmetricQuantizer, tuple[float, float]] = {}
        counts: dict[AsymmetricQuantizer, Tensor] = {}

        def widen(quantizer: AsymmetricQuantizer, x: Tensor) -> None:
            low, high = ends.get(quantizer, (0.0, 0.0))
            seen = torch.aminmax(x)
            ends[quantizer] = (
                min(low, float(seen.min)),
                max(high, float(seen.max)),
            )

        def count(quantizer: AsymmetricQuantizer, x: Tensor) -> None:
            low, high = ends[quantizer]
            if low == high:
                return  # Nothing but zeros.
            more = torch.histc(x.float(), BINS, low, high).cpu().double()
            counts[quantizer] = counts.get(quantizer, 0) + more

        with evaluation(model.model):
            for see in (widen, count):
                with _watched(model.model, see):
                    for item in islice(data.get_inference_data(), self.subset_size):
                        run(model.model, item)
        for quantizer, histogram in counts.items():
            low, high = least_squares(histogram, *ends[quantizer], quantizer.levels)
            quantizer.input_low.fill_(low)
            quantizer.input_range.fill_(high - low)
        return model


@contextmanager
def _watched(model: nn.Module, see: See) -> Iterator[None]:
    """Within it nothing is quantized, and activations of one range are seen."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, BaseQuantizer):
                forward = _passing(module, see)
                stack.enter_context(replaced(module, "forward", forward))
        yield


def _passing(quantizer: Any, see: See) -> Callable[[Any], Any]:
    enabled = quantizer.is_enabled_quantization()
    asymmetric = type(quantizer) is AsymmetricQuantizer
    of_one_range = asymmetric and quantizer.input_low.numel() == 1

    def forward(given: Any) -> Any:
        x = maybe_get_values_from_torch_return_type(given)
        if enabled and of_one_range and not isinstance(x, nn.Parameter):
            see(quantizer, x)
        return given

    return forward
