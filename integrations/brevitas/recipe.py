"""Stock Brevitas PTQ for ConvNets, as its ImageNet example runs it."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from brevitas.export.inference import quant_inference_mode
from brevitas.graph.calibrate import calibration_mode
from brevitas.graph.quantize import layerwise_quantize, preprocess_for_quantize
from brevitas.inject import value
from torch import Tensor, nn

from cora_plugin.adapters.operation import PLAIN
from cora_plugin.integrations.brevitas.fast import fast_range_searches
from cora_plugin.integrations.brevitas.layer_map import layer_map
from cora_plugin.integrations.brevitas.layers import unpack
from cora_plugin.integrations.brevitas.options import BrevitasOptions
from cora_plugin.integrations.computed import stored_weights
from cora_plugin.integrations.data import CalibrationData
from cora_plugin.integrations.doing import doing
from cora_plugin.integrations.ranges import estimator
from cora_plugin.layer import by_layer
from cora_plugin.outputs import device_of, in_batches, run
from cora_plugin.progress import bar

ACTIVATION_RANGES = {"percentile": "stats", "mse": "mse"}
"""How activation ranges are found, and what Brevitas calls it."""

TITLE = "Brevitas"


def quantize_ptq(
    model: nn.Module,
    calib_loader: Iterable[Any],
    weight_bits: int = BrevitasOptions.weight_bits,
    act_bits: int = BrevitasOptions.act_bits,
    depthwise_bits: int | None = BrevitasOptions.depthwise_bits,
    first_last_bits: int = BrevitasOptions.first_last_bits,
    equalize_iters: int = BrevitasOptions.equalize_iters,
    layer_bits: Mapping[str, int] | None = BrevitasOptions.layer_bits,
    act_range: str = BrevitasOptions.act_range,
    traced: bool = True,
) -> nn.Module:
    """Quantize a copy of a float ConvNet with Brevitas' layerwise backend.

    Per-channel MSE weight scales, asymmetric static activations, float biases, batch
    norms merged, ReLU6 kept; the first and last layer of an ImageNet model (3 input
    channels, 1,000 features) at `first_last_bits`, as Brevitas' own `quantize_model`
    has it.

    Args:
        model: The float model, untouched; weights that it computes (weight_norm and the
            like) are stored first.
        calib_loader: Yields images [N, …], `(images, targets)`, or what else the model
            takes; walked twice.
        weight_bits: Weight bit width.
        act_bits: Activation bit width.
        depthwise_bits: Weight bit width of depthwise convolutions; None: as the others.
        first_last_bits: Bit width of the first and last layer, activations too.
        equalize_iters: Iterations of weight equalization. With ReLU6 kept it hardly
            reaches a layer, and bias correction ends worse after it on Lite0.
        layer_bits: Weight bit widths by layer name or glob, over all others; the last
            that fits wins.
        act_range: `percentile`, the 99.999th of what is seen; `mse`, the range of least
            squared error, in twice the time; or `auto`, `mse` below 6 bits, where it
            is better, and `percentile` from there on.
        traced: Trace the model and merge batch norms; False, as Brevitas' script has it
            for learned round by block: quantize its layers where they are, with norms
            behind, and without activations that are functions.

    Raises:
        DataError: The loader is none or empty, or the model does not run with it.
        ModelError: The model is no module.
        ConfigError: An option is out of its bounds or unknown, or a key of `layer_bits`
            fits no layer.
        ToolkitError: Brevitas cannot quantize the model; its own error is behind.
    """
    BrevitasOptions(
        weight_bits=weight_bits,
        act_bits=act_bits,
        depthwise_bits=depthwise_bits,
        first_last_bits=first_last_bits,
        equalize_iters=equalize_iters,
        layer_bits=layer_bits,
        act_range=act_range,  # type: ignore[arg-type]  # It is checked there.
    )
    found = estimator(
        act_range, act_bits, ACTIVATION_RANGES, few="mse", many="percentile"
    )
    data = CalibrationData(model, calib_loader)

    def ends(module: Any) -> bool:
        if isinstance(module, nn.Conv2d):
            return module.in_channels == 3
        return isinstance(module, nn.Linear) and module.out_features == 1000

    @value  # type: ignore[untyped-decorator]
    def weight_bit_width(module: Any) -> int:
        if ends(module):
            return first_last_bits
        depthwise = isinstance(module, nn.Conv2d) and module.groups > 1
        if depthwise_bits is not None and depthwise and module.weight.shape[1] == 1:
            return depthwise_bits
        return weight_bits

    @value  # type: ignore[untyped-decorator]
    def act_bit_width(module: nn.Module) -> int:
        return first_last_bits if ends(module) else act_bits

    device = device_of(model)
    with doing(TITLE, "preparing the float model (traced, batch norms merged)"):
        prepared = copy.deepcopy(stored_weights(model)).eval()
        if traced:
            prepared = preprocess_for_quantize(
                prepared,
                equalize_iters=equalize_iters,
                equalize_merge_bias=True,
                merge_bn=True,
                relu6_to_relu=False,
            )
    layers = [n for n, m in prepared.named_modules() if isinstance(m, PLAIN)]
    chosen = by_layer("layer_bits", layer_bits or {}, layers)

    def of_bits(weight_bits: Any) -> Any:
        """What becomes of each kind of layer."""
        return layer_map(
            dtype=torch.float32,
            device=device,
            # Brevitas' exporters refuse the 32-bit bias of a channel that batch norm
            # has scaled to almost nothing: its steps are more than float32 can count.
            bias_bit_width=None,
            weight_bit_width=weight_bits,
            weight_param_method="mse",
            weight_scale_type="float_scale",
            weight_quant_type="sym",
            weight_quant_granularity="per_channel",
            weight_narrow_range=False,
            weight_quant_format="int",
            act_quant_format="int",
            act_scale_type="float_scale",
            act_param_method=ACTIVATION_RANGES[found],
            act_quant_type="asym",
            act_quant_granularity="per_tensor",
            act_quant_percentile=99.999,
            act_scale_computation_type="static",
            act_bit_width=act_bit_width,
        )

    # One pass for each bit width that is chosen, over the layers that have it.
    quantized: nn.Module = prepared
    with doing(TITLE, f"quantizing the layers (W{weight_bits}A{act_bits})"):
        for bits in {*chosen.values()}:
            others = [name for name in layers if chosen.get(name) != bits]
            quantized = layerwise_quantize(quantized, of_bits(bits), others)
        quantized = layerwise_quantize(quantized, of_bits(weight_bit_width))
    quantized.eval()
    with torch.no_grad(), doing(TITLE, "calibrating the activations"):
        run(quantized, data.first, unpack)  # initialises their scales
        with fast_range_searches(quantized), calibration_mode(quantized):
            for batch in bar(data, "calibration", "batch"):
                run(quantized, batch, unpack)
    return quantized.eval()


@torch.no_grad()
def logits(model: nn.Module, images: Tensor, batch_size: int = 32) -> Tensor:
    """Outputs of a quantized model [N, classes] in Brevitas' inference mode."""
    with quant_inference_mode(model.eval(), cache_quant_weight=True):
        in_batches(model, images[:1], 1, unpack)  # caches scales and weights
        return in_batches(model, images, batch_size, unpack)
