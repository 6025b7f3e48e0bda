"""The flag: `nncf.quantize` reads it once `register()` was called."""

import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import nncf.quantization.algorithms.post_training.algorithm as post_training
import nncf.torch.function_hook.quantization.quantize_model as torch_backend
from nncf import Dataset
from nncf.common.utils.backend import BackendType, get_backend
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters
from nncf.quantization.algorithms.bias_correction.algorithm import BiasCorrection
from nncf.quantization.algorithms.fast_bias_correction.algorithm import (
    FastBiasCorrection,
)
from nncf.quantization.algorithms.min_max.algorithm import MinMaxQuantization
from nncf.quantization.algorithms.pipeline import Pipeline

from cora_plugin.adapters.errors import CoRaError
from cora_plugin.config import CoRaConfig
from cora_plugin.integrations.nncf.algorithm import CoRaAlgorithm
from cora_plugin.integrations.nncf.dataset import ImageDataset
from cora_plugin.integrations.nncf.extension import load_extension
from cora_plugin.integrations.nncf.layer_bits import LayerBits

_READ_FIRST = "smooth_quant_alphas"
"""The field that NNCF reads first when it builds its pipeline …"""

_PIPELINE = post_training.create_ptq_pipeline.__module__
"""… and the module that does."""


@dataclass
class CoRaQuantizationParameters(AdvancedQuantizationParameters):
    """NNCF's advanced parameters with the plugin's flag; register() comes first.

    >>> register()
    >>> nncf.quantize(
    ...     model,
    ...     dataset,
    ...     advanced_parameters=CoRaQuantizationParameters(cora="budget=0.05"),
    ... )

    Args:
        cora: A `CoRaConfig` or anything that `CoRaConfig.of` reads; None: no adapters.
        first_last_bits: Bit width of the first and last layer; None: as the others.
        depthwise_bits: Bit width of depthwise weights; None: as the others.
        layer_bits: Bit widths of weights by layer name or glob, over all others; the
            last that fits wins.
    """

    cora: Any = None
    first_last_bits: int | None = None
    depthwise_bits: int | None = None
    layer_bits: Mapping[str, int] | None = None

    def __getattribute__(self, name: str) -> Any:
        """The field; NNCF's own pipeline, which would ignore ours, is refused."""
        value = super().__getattribute__(name)
        if name != _READ_FIRST or _registered() or not _wanted(self):
            return value
        # Whoever else reads it, such as repr() and dataclasses.replace(), may.
        if sys._getframe(1).f_globals.get("__name__") == _PIPELINE:
            raise CoRaError(
                "CoRaQuantizationParameters: NNCF does not know of them yet and would "
                "leave the adapters out; call "
                "cora_plugin.integrations.nncf.register() before nncf.quantize"
            )
        return value


class register:  # noqa: N801, a function in its use
    """Have `nncf.quantize` read the flag, typed or among its `backend_params`.

    >>> register()  # for good, or until unregister()
    >>> with register():  # for a block
    ...     nncf.quantize(
    ...         model,
    ...         dataset,
    ...         advanced_parameters=AdvancedQuantizationParameters(
    ...             backend_params={"cora": {"budget": 0.05}}
    ...         ),
    ...     )

    Calls without the flag go on as before. To register twice is to register once.
    """

    def __init__(self) -> None:
        self._was_registered = _registered()
        if not self._was_registered:
            for module, name, reading_the_flag in _REPLACED:
                setattr(module, name, reading_the_flag(getattr(module, name)))

    def __enter__(self) -> "register":
        """It is done already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Go back to what was before."""
        if not self._was_registered:
            unregister()


def unregister() -> None:
    """Undo `register()`."""
    if _registered():
        for module, name, _ in _REPLACED:
            setattr(module, name, getattr(module, name).__wrapped__)


def _registered() -> bool:
    return getattr(post_training.create_ptq_pipeline, "reads_cora_flag", False)


def _wanted(parameters: CoRaQuantizationParameters) -> bool:
    return _flag(parameters) is not None or bool(_bits(parameters))


def _bits(parameters: Any) -> dict[str, Any]:
    """The bit widths that are set, as arguments of `LayerBits`."""
    given = {
        "first_last": getattr(parameters, "first_last_bits", None),
        "depthwise": getattr(parameters, "depthwise_bits", None),
        "layers": getattr(parameters, "layer_bits", None),
    }
    return {name: bits for name, bits in given.items() if bits is not None}


def _flag(parameters: Any) -> Any:
    """The flag's value, None where it is not set."""
    value = getattr(parameters, "cora", None)
    if value is None:
        given: Mapping[str, Any] = getattr(parameters, "backend_params", None) or {}
        value = given.get("cora")
    return None if value is False else value


def _with_our_steps(original: Any) -> Any:
    """`create_ptq_pipeline` with the plugin's steps where the flag asks for them."""

    @functools.wraps(original)
    def create_ptq_pipeline(*args: Any, **kwargs: Any) -> Pipeline:
        pipeline = original(*args, **kwargs)
        parameters: Any = kwargs.get("advanced_parameters")
        flag = _flag(parameters)
        bits = _bits(parameters)
        if flag is None and not bits:
            return pipeline
        steps = [list(step) for step in pipeline.pipeline_steps]
        if bits:
            for step in steps:
                for index, algorithm in enumerate(step):
                    if isinstance(algorithm, MinMaxQuantization):
                        step.insert(index + 1, LayerBits(**bits))
                        break
        if flag is not None:
            steps = [
                [
                    algorithm
                    for algorithm in step
                    if not isinstance(algorithm, FastBiasCorrection | BiasCorrection)
                ]
                for step in steps
            ]
            corrected = not parameters.disable_bias_correction
            subset_size = kwargs.get("subset_size")
            steps.append([CoRaAlgorithm(CoRaConfig.of(flag), subset_size, corrected)])
        return CoRaPipeline(steps)

    create_ptq_pipeline.reads_cora_flag = True  # type: ignore[attr-defined]
    return create_ptq_pipeline


def _with_images_only(original: Any) -> Any:
    """The PyTorch backend's `quantize`, with checked data where the flag is set."""

    @functools.wraps(original)
    def quantize_impl(*args: Any, **kwargs: Any) -> Any:
        if _flag(kwargs.get("advanced_parameters")) is not None:
            dataset = kwargs["calibration_dataset"]
            kwargs["calibration_dataset"] = ImageDataset(dataset)
        return original(*args, **kwargs)

    return quantize_impl


_REPLACED = (
    (post_training, "create_ptq_pipeline", _with_our_steps),
    (torch_backend, "quantize_impl", _with_images_only),
)
"""Functions of NNCF, where they are looked up at each call, and what replaces them."""


class CoRaPipeline(Pipeline):
    """A pipeline of NNCF that hands its dataset to CoRa and refuses other backends."""

    def run_from_step(
        self,
        model: Any,
        dataset: Dataset,
        graph: Any = None,
        start_step_index: int = 0,
        step_index_to_statistics: Any = None,
    ) -> Any:
        """Run the steps.

        Raises:
            CoRaError: The backend is not PyTorch, or a bit width is refused.
        """
        backend = get_backend(model)
        if backend is not BackendType.TORCH:
            raise CoRaError(
                f"cora: the model is of NNCF's {backend.name} backend; supported is "
                "TORCH: quantize the torch.nn.Module and export it afterwards"
            )
        load_extension()
        for algorithm in (a for step in self.pipeline_steps for a in step):
            # NNCF hands no dataset to `apply`.
            if isinstance(algorithm, CoRaAlgorithm):
                algorithm.dataset = dataset
        try:
            return super().run_from_step(
                model, dataset, graph, start_step_index, step_index_to_statistics
            )
        except ValueError as error:
            if "HW capabilities" not in str(error):
                raise
            raise CoRaError(
                "num_bits: NNCF's hardware tables do not list this bit width; call "
                "nncf.quantize within cora_plugin.integrations.nncf.allow_bits(4) (or "
                "any of 2 to 8)"
            ) from error
