"""The flag that `nncf.quantize` reads: typed parameters, and `register()`."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from nncf import Dataset
from nncf.common.utils.backend import BackendType, get_backend
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters
from nncf.quantization.algorithms.algorithm import Algorithm
from nncf.quantization.algorithms.bias_correction.algorithm import BiasCorrection
from nncf.quantization.algorithms.fast_bias_correction.algorithm import (
    FastBiasCorrection,
)
from nncf.quantization.algorithms.min_max.algorithm import MinMaxQuantization
from nncf.quantization.algorithms.pipeline import Pipeline
from torch import nn

from cora_plugin.adapters.errors import ConfigError, ModelError
from cora_plugin.config import AnyConfig, CoRaConfig
from cora_plugin.integrations.computed import computed_hints, make_copyable
from cora_plugin.integrations.doing import doing
from cora_plugin.integrations.nncf import private
from cora_plugin.integrations.nncf.algorithm import CoRaAlgorithm
from cora_plugin.integrations.nncf.dataset import ImageDataset
from cora_plugin.integrations.nncf.extension import load_extension
from cora_plugin.integrations.nncf.layer_bits import LayerBits
from cora_plugin.integrations.nncf.layers import refuse_sequential
from cora_plugin.integrations.nncf.ranges import LeastSquaresRanges
from cora_plugin.outputs import device_of


@dataclass
class CoRaQuantizationParameters(AdvancedQuantizationParameters):
    """NNCF's advanced parameters with the plugin's flag.

    >>> nncf.quantize(
    ...     model,
    ...     dataset,
    ...     advanced_parameters=CoRaQuantizationParameters(cora="budget=0.05"),
    ... )

    `nncf.quantize` reads them as they are, whether or not `register()` was called.

    Args:
        cora: A `CoRaConfig` or anything that `CoRaConfig.of` reads; None: no adapters.
        first_last_bits: Bit width of the first and last layer; None: as the others.
        depthwise_bits: Bit width of depthwise weights; None: as the others.
        layer_bits: Bit widths of weights by layer name or glob, over all others; the
            last that fits wins.
        other_bits: Bit width of weights that are no layer's, of embeddings and norms;
            None: as the others.
        least_squares: Give activations the ranges of least squared error, whatever
            NNCF's estimator found; see `LeastSquaresRanges`.
        teacher: A float model whose outputs the quantized one is to be near to, in
            place of its own float weights'; see `apply_cora`.
    """

    cora: AnyConfig = None
    first_last_bits: int | None = None
    depthwise_bits: int | None = None
    layer_bits: Mapping[str, int] | None = None
    other_bits: int | None = None
    least_squares: bool = False
    teacher: nn.Module | None = None


class register:  # noqa: N801, a function in its use
    """Have `nncf.quantize` read the flag among NNCF's own `backend_params`, too.

    >>> register()  # for good, or until unregister()
    >>> with register():  # for a block
    ...     nncf.quantize(
    ...         model,
    ...         dataset,
    ...         advanced_parameters=AdvancedQuantizationParameters(
    ...             backend_params={"cora": {"budget": 0.05}}
    ...         ),
    ...     )

    Calls without the flag behave as before. A second call changes nothing.
    """

    _active = False

    def __init__(self) -> None:
        self._was_active = register._active
        register._active = True

    def __enter__(self) -> "register":
        """Nothing: the call has registered."""
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Undo the registration, unless there was one before."""
        register._active = self._was_active


def unregister() -> None:
    """Undo `register()`; `CoRaQuantizationParameters` are still read."""
    register._active = False


def _bits(parameters: Any) -> dict[str, Any]:
    """The bit widths that are set, as arguments of `LayerBits`."""
    if not isinstance(parameters, CoRaQuantizationParameters):
        return {}
    given = {
        "first_last": parameters.first_last_bits,
        "depthwise": parameters.depthwise_bits,
        "layers": parameters.layer_bits,
        "others": parameters.other_bits,
    }
    return {name: bits for name, bits in given.items() if bits is not None}


KEY = "cora"
"""The flag's key among NNCF's `backend_params`."""


def _flag(parameters: Any) -> Any:
    """The flag's value, None where it is not set.

    Raises:
        ConfigError: It is set where NNCF alone would ignore it, without `register()`,
            or under a name that is nearly its own.
    """
    typed = isinstance(parameters, CoRaQuantizationParameters)
    given: Mapping[Any, Any] = getattr(parameters, "backend_params", None) or {}
    for name in given:
        if name != KEY and _is_nearly_ours(name):
            raise ConfigError(
                ("backend_params",),
                f"{name!r} is nothing that NNCF reads; did you mean {KEY!r}?",
            )
    value = parameters.cora if typed else None
    if value is None:
        value = given.get(KEY)
    if value is None or value is False:
        return None
    if not typed and not register._active:
        raise ConfigError(
            ("backend_params",),
            '"cora" is read after register() only, else NNCF would ignore it; call '
            "cora_plugin.integrations.nncf.register() before nncf.quantize, or pass "
            "CoRaQuantizationParameters(cora=…)",
        )
    return value


def _is_nearly_ours(name: Any) -> bool:
    """Whether a key is the flag's but for a slip."""
    letters = "".join(filter(str.isalpha, str(name).casefold()))
    short = letters.removesuffix("plugin").removesuffix("config")
    return bool(difflib.get_close_matches(short, [KEY], cutoff=0.7))


def _with_our_steps(original: Any) -> Any:
    """`create_ptq_pipeline` with the plugin's steps where the flag asks for them."""

    def create_ptq_pipeline(*args: Any, **kwargs: Any) -> Pipeline:
        pipeline = original(*args, **kwargs)
        parameters: Any = kwargs.get("advanced_parameters")
        flag = _flag(parameters)
        behind: list[Algorithm] = []
        bits = _bits(parameters)
        if bits:
            behind.append(LayerBits(**bits))
        if getattr(parameters, "least_squares", False):
            behind.append(LeastSquaresRanges(kwargs.get("subset_size")))
        if flag is None and not behind:
            return pipeline
        steps = [list(step) for step in pipeline.pipeline_steps]
        for step in steps:
            for index, algorithm in enumerate(step):
                if isinstance(algorithm, MinMaxQuantization):
                    step[index + 1 : index + 1] = behind
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
            config, pinned = CoRaConfig.of(flag), bits.get("layers")
            teacher = getattr(parameters, "teacher", None)
            ours = CoRaAlgorithm(config, subset_size, corrected, pinned, teacher)
            steps.append([ours])
        return CoRaPipeline(steps)

    return create_ptq_pipeline


def _with_images_only(original: Any) -> Any:
    """The PyTorch backend's `quantize`, with checked data where the flag is set."""

    def quantize_impl(*args: Any, **kwargs: Any) -> Any:
        if _flag(kwargs.get("advanced_parameters")) is None:
            return original(*args, **kwargs)
        model = kwargs["model"]
        refuse_sequential(model)
        make_copyable(model)
        dataset = ImageDataset(kwargs["calibration_dataset"], model, run=True)
        hints = computed_hints(model, "nncf.quantize")
        with doing("NNCF", "quantizing the model, with the flag cora", hints):
            return original(*args, **{**kwargs, "calibration_dataset": dataset})

    return quantize_impl


# Once and for good: parameters may come from anywhere, from a copy or a pickle, too.
# Without the flag both do what NNCF does.
private.wrap_pipeline(_with_our_steps)
private.wrap_torch_quantize(_with_images_only)


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
            ModelError: The backend is not PyTorch.
            ConfigError: A bit width is refused.
        """
        backend = get_backend(model)
        if backend is not BackendType.TORCH:
            raise ModelError(
                f"cora: the model is of NNCF's {backend.name} backend; supported is "
                "TORCH: quantize the torch.nn.Module and export it afterwards"
            )
        load_extension(device_of(model.model))
        for algorithm in (a for step in self.pipeline_steps for a in step):
            # NNCF hands no dataset to `apply`.
            if isinstance(algorithm, CoRaAlgorithm | LeastSquaresRanges):
                algorithm.dataset = dataset
        try:
            return super().run_from_step(
                model, dataset, graph, start_step_index, step_index_to_statistics
            )
        except ValueError as error:
            if not private.is_width_refused(error):
                raise
            raise ConfigError(
                ("num_bits",),
                "NNCF's hardware tables do not list this bit width; call nncf.quantize "
                "within cora_plugin.integrations.nncf.allow_bits(4) (or any of 2 to 8)",
            ) from error
