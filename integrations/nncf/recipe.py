"""NNCF's PTQ for ConvNets at low bit widths, by its own means."""

from collections.abc import Iterable, Mapping
from typing import Any

import nncf
import torch
from nncf.quantization.advanced_parameters import (
    AdvancedBiasCorrectionParameters,
    AdvancedSmoothQuantParameters,
    QuantizationParameters,
)
from nncf.quantization.range_estimator import (
    AggregatorType,
    RangeEstimatorParameters,
    RangeEstimatorParametersSet,
    StatisticsCollectorParameters,
    StatisticsType,
)
from torch import nn

from cora_plugin.config import AnyConfig
from cora_plugin.integrations.computed import stored_weights
from cora_plugin.integrations.data import CalibrationData
from cora_plugin.integrations.doing import doing
from cora_plugin.integrations.nncf.bits import FEW, allow_bits
from cora_plugin.integrations.nncf.extension import load_extension
from cora_plugin.integrations.nncf.layers import chained
from cora_plugin.integrations.nncf.options import NNCFOptions
from cora_plugin.integrations.nncf.register import CoRaQuantizationParameters
from cora_plugin.integrations.ranges import estimator
from cora_plugin.outputs import device_of, suited

ACTIVATION_RANGES = {
    "default": RangeEstimatorParameters(),
    "minmax": RangeEstimatorParametersSet.MINMAX,
    "mean-quantile": RangeEstimatorParametersSet.MEAN_QUANTILE,
    "histogram": RangeEstimatorParametersSet.HISTOGRAM,
    "mse": RangeEstimatorParameters(),
}
"""NNCF's estimators of activation ranges; `mse` is ours, and goes on from the default.

NNCF's `histogram` minimizes the squared error, too, but that of 256 levels always."""


TITLE = "NNCF"

OTHER_BITS = 8
"""Of embeddings and norms, which carry no adapters.

NNCF gives all scales of a norm one step, which at 4 bits loses more than all layers.
"""


def quantize_ptq(
    model: nn.Module,
    calib_loader: Iterable[Any],
    weight_bits: int = NNCFOptions.weight_bits,
    act_bits: int = NNCFOptions.act_bits,
    depthwise_bits: int | None = NNCFOptions.depthwise_bits,
    first_last_bits: int | None = NNCFOptions.first_last_bits,
    layer_bits: Mapping[str, int] | None = NNCFOptions.layer_bits,
    bias_correction: bool = False,
    weight_quantile: float | None = NNCFOptions.weight_quantile,
    act_range: str = NNCFOptions.act_range,
    smooth_quant: float | None = NNCFOptions.smooth_quant,
    cora: AnyConfig = None,
) -> nn.Module:
    """Quantize a copy of a float ConvNet by `nncf.quantize`.

    Symmetric weights with a scale a channel, asymmetric activations (the mixed preset);
    embeddings and norms at 8 bits.

    Args:
        model: The float model, untouched; weights that it computes (weight_norm and the
            like) are stored first, and a bare `nn.Sequential`, which NNCF cannot read,
            becomes a module whose layers have the same names.
        calib_loader: Yields images [N, …], `(images, targets)`, or what else the model
            takes; walked several times.
        weight_bits: Weight bit width, 2 to 8.
        act_bits: Activation bit width, 2 to 8.
        depthwise_bits: Weight bit width of depthwise convolutions; None: as the others.
        first_last_bits: Bit width of the first and last layer, activations too; None:
            as the others.
        layer_bits: Weight bit widths by layer name or glob, over all others; the last
            that fits wins.
        bias_correction: Run NNCF's fast bias correction on every layer, whatever the
            size of the correction. With `cora`: correct biases after the adapters.
        weight_quantile: Share of a channel's weights that may be clipped at its range,
            at 4 bits and fewer; None clips none, as in bfloat16 models, for whose
            tensors NNCF has no quantiles.
        act_range: Estimator of activation ranges, a key of `ACTIVATION_RANGES`; or
            `auto`, `mse` below 6 bits and `default` from there on.
        smooth_quant: Alpha of SmoothQuant for linear layers and convolutions; None:
            none. NNCF has it for its model type "transformer", which is then asked for.
        cora: Adapters, anything that `CoRaConfig.of` reads; None: none.

    Raises:
        CoRaError: Something that the caller can change is wrong; a `ToolkitError` where
            NNCF fails, its own error behind.
    """
    NNCFOptions(
        weight_bits=weight_bits,
        act_bits=act_bits,
        depthwise_bits=depthwise_bits,
        first_last_bits=first_last_bits,
        layer_bits=layer_bits,
        weight_quantile=weight_quantile,
        act_range=act_range,  # type: ignore[arg-type]  # It is checked there.
        smooth_quant=smooth_quant,
    )
    found = estimator(act_range, act_bits, ACTIVATION_RANGES, few="mse", many="default")
    data = CalibrationData(model, calib_loader)
    model = chained(model)
    device = device_of(model)
    load_extension(device)
    parameters = CoRaQuantizationParameters(
        cora=cora,
        first_last_bits=first_last_bits,
        depthwise_bits=depthwise_bits,
        layer_bits=layer_bits,
        other_bits=OTHER_BITS,
        disable_bias_correction=not bias_correction,
        # The default skips what it deems too large, at low bits nearly every layer.
        bias_correction_params=AdvancedBiasCorrectionParameters(threshold=float("inf")),
        weights_quantization_params=QuantizationParameters(num_bits=weight_bits),
        activations_quantization_params=QuantizationParameters(num_bits=act_bits),
        activations_range_estimator_params=ACTIVATION_RANGES[found],
        least_squares=found == "mse",
        weights_range_estimator_params=_weight_range(
            weight_quantile if weight_bits <= FEW and not _is_bfloat16(model) else None
        ),
        overflow_fix=nncf.OverflowFix.DISABLE,
    )
    if smooth_quant is not None:
        parameters.smooth_quant_alphas = AdvancedSmoothQuantParameters(
            convolution=smooth_quant, matmul=smooth_quant
        )
    dataset = nncf.Dataset(data, lambda batch: suited(model, batch))
    what = f"quantizing the model (W{weight_bits}A{act_bits})"
    with allow_bits(weight_bits, act_bits), doing(TITLE, what):
        quantized: nn.Module = nncf.quantize(
            stored_weights(model),
            dataset,
            preset=nncf.QuantizationPreset.MIXED,
            model_type=None if smooth_quant is None else nncf.ModelType.TRANSFORMER,
            advanced_parameters=parameters,
        )
    return quantized


def _is_bfloat16(model: nn.Module) -> bool:
    return any(p.dtype is torch.bfloat16 for p in model.parameters())


def _weight_range(quantile: float | None) -> RangeEstimatorParameters:
    if quantile is None:
        return RangeEstimatorParameters()
    clipped = StatisticsCollectorParameters(
        statistics_type=StatisticsType.ABS_QUANTILE,
        aggregator_type=AggregatorType.MAX,
        quantile_outlier_prob=quantile,
    )
    return RangeEstimatorParameters(
        min=StatisticsCollectorParameters(
            statistics_type=StatisticsType.MIN, aggregator_type=AggregatorType.MIN
        ),
        max=clipped,
    )
