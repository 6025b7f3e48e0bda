"""The base class of the steps that the plugin adds to NNCF's pipeline."""

from abc import abstractmethod
from typing import Any

from nncf import Dataset
from nncf.common.graph.graph import NNCFGraph
from nncf.common.tensor_statistics.statistic_point import StatisticPointsContainer
from nncf.common.utils.backend import BackendType
from nncf.quantization.algorithms.algorithm import Algorithm


class TorchStep(Algorithm):
    """An algorithm for PyTorch models that wants none of NNCF's statistics."""

    @property
    def available_backends(self) -> list[BackendType]:
        """PyTorch."""
        return [BackendType.TORCH]

    def get_statistic_points(
        self, model: Any, graph: NNCFGraph
    ) -> StatisticPointsContainer:
        """None: NNCF's collectors hold activations, CoRa streams its own moments."""
        return StatisticPointsContainer()

    @abstractmethod
    def apply(
        self,
        model: Any,
        graph: NNCFGraph,
        statistic_points: StatisticPointsContainer | None = None,
        dataset: Dataset | None = None,
    ) -> Any:
        """Change NNCF's wrapped model in place."""
