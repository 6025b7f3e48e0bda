"""Models of timm in plain layers of torch, which any toolkit can trace."""

import copy
import math
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from cora_plugin.adapters.errors import ModelError


def static_padding(model: nn.Module, example_input: Tensor) -> nn.Module:
    """Copy of a timm model whose convolutions no longer pad by their input's size.

    timm's `Conv2dSame` pads to `ceil(n / stride)` outputs, by an amount computed from
    the input at each call, which no tracer can follow. At a fixed input size it is a
    constant: each one becomes a plain `nn.Conv2d`, behind an `nn.ZeroPad2d` where the
    two sides differ. The outputs stay the same for inputs of the example's size, and
    the weights are shared by neither copy.

    Args:
        model: any model; without a `Conv2dSame` the copy is all that happens.
        example_input: [N, C, H, W], what the model will be fed with.

    Raises:
        ModelError: a `Conv2dSame` is not reached by the example, or is reached with
            inputs of several sizes.
    """
    if find_spec("timm") is None:
        return copy.deepcopy(model)
    from timm.layers.conv2d_same import Conv2dSame

    sizes: dict[str, set[tuple[int, int]]] = {}
    probe = copy.deepcopy(model).eval()
    for name, module in probe.named_modules():
        if isinstance(module, Conv2dSame):
            seen = sizes[name] = set()
            module.register_forward_pre_hook(
                lambda _, inputs, seen=seen: seen.add(tuple(inputs[0].shape[-2:]))
            )
    if sizes:
        with torch.no_grad():
            probe(example_input)

    result = copy.deepcopy(model)
    for name, seen in sizes.items():
        if len(seen) != 1:
            raise ModelError(
                f"{name}: the example input reaches it with {len(seen)} sizes "
                f"({sorted(seen)}); static padding needs exactly one"
            )
        conv = result.get_submodule(name)
        _replace(result, name, _static(conv, seen.pop()))  # type: ignore[arg-type]
    return result


def plain_norms(model: nn.Module) -> nn.Module:
    """Copy of a timm model whose batch norms are plain `nn.BatchNorm2d`.

    timm's `BatchNormAct2d` holds the activation too and computes by function, so that
    Brevitas finds no batch norm to merge into the convolution before it. Each one
    becomes a batch norm and its activation, in a row; the outputs stay the same.
    """
    if find_spec("timm") is None:
        return copy.deepcopy(model)
    from timm.layers.norm_act import BatchNormAct2d

    result = copy.deepcopy(model)
    fused = [
        (name, module)
        for name, module in result.named_modules()
        if isinstance(module, BatchNormAct2d)
    ]
    for name, module in fused:
        norm = nn.BatchNorm2d(
            module.num_features,
            module.eps,
            module.momentum,
            module.affine,
            module.track_running_stats,
            device="meta",
        )
        norm.load_state_dict(module.state_dict(), assign=True)
        parts = (norm, module.drop, module.act)
        kept = [part for part in parts if not isinstance(part, nn.Identity)]
        row = nn.Sequential(*kept) if len(kept) > 1 else norm
        _replace(result, name, row.train(module.training))
    return result


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _static(conv: nn.Conv2d, size: tuple[int, int]) -> nn.Module:
    """The plain equivalent of a `Conv2dSame` for inputs [N, C, *size]."""
    before, after = [], []
    for n, k, s, d in zip(
        size, conv.kernel_size, conv.stride, conv.dilation, strict=True
    ):
        total = max((math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n, 0)
        before.append(total // 2)
        after.append(total - total // 2)
    symmetric = before == after
    plain = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        (conv.kernel_size[0], conv.kernel_size[1]),
        (conv.stride[0], conv.stride[1]),
        (before[0], before[1]) if symmetric else 0,
        (conv.dilation[0], conv.dilation[1]),
        conv.groups,
        conv.bias is not None,
        device="meta",  # Nothing to initialise: the parameters are the old ones.
    )
    plain.weight, plain.bias = conv.weight, conv.bias
    plain.train(conv.training)
    if symmetric:
        return plain
    return nn.Sequential(
        nn.ZeroPad2d((before[1], after[1], before[0], after[0])), plain
    ).train(conv.training)
