"""Quantizes any small net by either toolkit, called as the net is called."""

import copy

import torch


def quantized(host, net, calls, weight_bits=4, dtype=torch.float32, act="asym"):
    """A copy in 4 and 8 bits, calibrated with calls: each a tuple or a mapping."""
    net = copy.deepcopy(net).eval().to(dtype)
    made = {"brevitas": by_brevitas, "nncf": by_nncf}[host]
    return made(net, calls, weight_bits, dtype, act)


def call(model, batch):
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def by_brevitas(net, calls, weight_bits, dtype, act, scales="stats"):
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import layerwise_quantize

    from cora_plugin.integrations.brevitas.layer_map import layer_map

    made = layer_map(
        dtype=dtype,
        device="cpu",
        bias_bit_width=None,
        weight_bit_width=weight_bits,
        weight_param_method=scales,
        weight_scale_type="float_scale",
        weight_quant_type="sym",
        weight_quant_granularity="per_channel",
        weight_narrow_range=False,
        weight_quant_format="int",
        act_quant_format="int",
        act_scale_type="float_scale",
        act_param_method="stats",
        act_quant_type=act,
        act_quant_granularity="per_tensor",
        act_quant_percentile=99.999,
        act_scale_computation_type="static",
        act_bit_width=8,
    )
    model = layerwise_quantize(net, made)
    with torch.no_grad(), calibration_mode(model):
        for batch in calls:
            call(model, batch)
    return model.eval()


def by_nncf(net, calls, weight_bits, dtype, act):
    import nncf
    from nncf.quantization.advanced_parameters import QuantizationParameters

    from cora_plugin.integrations.nncf import allow_bits

    presets = nncf.QuantizationPreset
    with allow_bits(weight_bits, 8):
        return nncf.quantize(
            net,
            nncf.Dataset(list(calls)),
            preset=presets.MIXED if act == "asym" else presets.PERFORMANCE,
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                disable_bias_correction=True,
                weights_quantization_params=QuantizationParameters(
                    num_bits=weight_bits
                ),
            ),
        )


def adapt(host, model, loader, config="budget=0.2", **options):
    """`apply_cora` of a host."""
    if host == "brevitas":
        from cora_plugin.integrations.brevitas import apply_cora

        return apply_cora(loader, model, config, **options)
    from cora_plugin.integrations.nncf import apply_cora

    return apply_cora(model, loader, config, **options)


def export(host, model, example, path, **options):
    """The host's ONNX; returns how far it is from torch."""
    if host == "brevitas":
        from cora_plugin.integrations.brevitas import export_onnx_qcdq

        return export_onnx_qcdq(model, example, path, **options)
    from cora_plugin.integrations.nncf import export_onnx

    return export_onnx(model, example, path, **options)
