"""Brevitas' algorithms that round weights otherwise than to the nearest."""

import re
from argparse import Namespace
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from cora_plugin.adapters.errors import ConfigError
from cora_plugin.integrations.brevitas.options import BrevitasOptions


def round_weights(
    model: nn.Module, calib_loader: Iterable[Any], options: BrevitasOptions
) -> None:
    """Run the algorithm that rounds weights, if the options name one.

    In place; GPTQ, GPFQ and Qronos take channels in the order of their activations. For
    adapters behind it, take a `snapshot` of the model before.

    Args:
        model: The quantized, calibrated model.
        calib_loader: Yields `(images, targets)`; walked once a layer or block.
        options: Name GPTQ, GPFQ, Qronos, learned round or none.

    Raises:
        ConfigError: No module is such a block as the options say.
    """
    from brevitas_examples.imagenet_classification.ptq import ptq_common

    if options.gptq:
        ptq_common.apply_gptq(
            calib_loader, model, act_order=True, create_weight_orig=True
        )
    elif options.gpfq:
        ptq_common.apply_gpfq(calib_loader, model, act_order=True)
    elif options.qronos:
        ptq_common.apply_qronos(model, calib_loader, act_order=True)
    elif options.learned_round is not None:
        _learn(model, calib_loader, options)


def _learn(
    model: nn.Module, calib_loader: Iterable[Any], options: BrevitasOptions
) -> None:
    """Learn to round each weight up or down (AdaRound; by block: BRECQ).

    The rest is what Brevitas' script has by default, but a batch of 16 for 1.
    """
    from brevitas_examples.imagenet_classification.ptq.learned_round_utils import (
        apply_learned_round,
    )

    blockwise = options.learned_round == "block"
    if blockwise:
        check_blocks(
            model, options.learned_round_blocks, ("ptq", "learned_round_blocks")
        )
    settings = Namespace(
        learned_round="identity" if blockwise else "hard_sigmoid",
        learned_round_mode="blockwise" if blockwise else "layerwise",
        # Brevitas refuses the regularizer, which hard_sigmoid needs, for blocks.
        learned_round_loss="mse" if blockwise else "regularised_mse",
        learned_round_lr=1e-3,
        learned_round_lr_scheduler=None,
        learned_round_iters=options.learned_round_iters,
        learned_round_batch_size=16,
    )
    apply_learned_round(model, calib_loader, settings, options.learned_round_blocks)


def check_blocks(
    model: nn.Module, pattern: str, key: tuple[str, ...], where: str = ""
) -> None:
    """Refuse a pattern that is in no module's own name, or in that of one to skip.

    Raises:
        ConfigError: It is, for the key at `where`.
    """
    own = {path.rpartition(".")[2] for path, _ in model.named_modules()} - {""}
    if not any(re.search(pattern, each) for each in own):
        raise ConfigError(
            key,
            f"{pattern!r} is found in no module's own name; there are "
            f"{', '.join(sorted(own))}",
            where,
        )
    for path, block in _blocks(model, pattern):
        held = (getattr(each, "weight", None) for each in block.modules())
        if not any(isinstance(each, Tensor) and each.ndim > 1 for each in held):
            raise ConfigError(
                key,
                f"{pattern!r} is found in {path}, which holds no layer with a weight "
                f"to round ({type(block).__name__}); have it match blocks that do",
                where,
            )


def _blocks(
    model: nn.Module, pattern: str, where: str = ""
) -> Iterator[tuple[str, Any]]:
    """The outermost modules with the pattern in their own name, as Brevitas has it."""
    for name, child in model.named_children():
        path = f"{where}.{name}" if where else name
        if re.search(pattern, name):
            yield path, child
        else:
            yield from _blocks(child, pattern, path)
