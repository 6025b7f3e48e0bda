"""What becomes of each kind of layer: the stock recipe, and kinds that it lacks."""

from typing import Any

import brevitas.nn as qnn
from brevitas.inject import value
from brevitas.inject.enum import ScalingPerOutputType
from torch import nn

from cora_plugin.integrations.brevitas import private


def layer_map(**settings: Any) -> Any:
    """The example's map, for `layerwise_quantize`, with layers over three axes.

    They are made like those over two. The weight of a grouped transposed convolution
    has one scale in all: Brevitas (0.13.4) gives scales a channel the shape of all
    outputs, where that weight has those of one group, and fails.
    """
    made = dict(private.layer_map(**settings))
    _, arguments = made[nn.Conv2d]
    _, transposed = made[nn.ConvTranspose2d]
    if settings.get("weight_quant_granularity") == "per_channel":
        given = transposed["weight_quant"].let(scaling_per_output_type=_scales)
        transposed = transposed | {"weight_quant": given}
    return made | {
        nn.Conv3d: (qnn.QuantConv3d, arguments),
        nn.ConvTranspose1d: (qnn.QuantConvTranspose1d, transposed),
        nn.ConvTranspose2d: (qnn.QuantConvTranspose2d, transposed),
        nn.ConvTranspose3d: (qnn.QuantConvTranspose3d, transposed),
    }


@value  # type: ignore[untyped-decorator]
def _scales(module: Any) -> ScalingPerOutputType:
    if module.groups > 1:
        return ScalingPerOutputType.TENSOR
    return ScalingPerOutputType.CHANNEL
