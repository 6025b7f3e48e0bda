"""What the benchmarks ask of a toolkit, in the same words for each."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor, nn

from cora_plugin import Report


class Toolkit(Protocol):
    """A toolkit's PTQ, its own ways to better it, and CoRa on top."""

    recipes: tuple[str, ...]

    def quantize(self, net: nn.Module, loader: Any, options: Any) -> nn.Module:
        """A quantized copy of a float network."""

    def better(self, model: nn.Module, loader: Any, recipe: str) -> nn.Module:
        """Apply one of `recipes`, which comes before the adapters."""

    def adapt(self, model: nn.Module, loader: Any, config: Any) -> Report:
        """Add adapters in place."""

    def correct_bias(self, model: nn.Module, loader: Any) -> nn.Module:
        """Apply the toolkit's bias correction, which comes last."""

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """Outputs of a quantized model."""


class Brevitas:
    """Brevitas' layerwise backend, GPTQ, and its bias correction."""

    recipes = ("ptq", "gptq")

    def quantize(self, net: nn.Module, loader: Any, options: Any) -> nn.Module:
        """Stock PTQ as in Brevitas' ImageNet example."""
        from cora_plugin.integrations.brevitas.recipe import quantize_ptq

        return quantize_ptq(
            net,
            loader,
            options.weight_bits,
            options.act_bits,
            options.depthwise_bits,
            equalize_iters=options.equalize_iters,
        )

    def better(self, model: nn.Module, loader: Any, recipe: str) -> nn.Module:
        """GPTQ with act order and quantized inputs, or nothing."""
        from brevitas_examples.imagenet_classification.ptq.ptq_common import apply_gptq

        if recipe == "gptq":
            apply_gptq(loader, model, act_order=True, create_weight_orig=True)
        return model

    def adapt(self, model: nn.Module, loader: Any, config: Any) -> Report:
        """CoRa in place."""
        from cora_plugin.integrations.brevitas import apply_cora

        return apply_cora(loader, model, config)

    def correct_bias(self, model: nn.Module, loader: Any) -> nn.Module:
        """Brevitas' own bias correction."""
        from brevitas_examples.imagenet_classification.ptq.ptq_common import (
            apply_bias_correction,
        )

        apply_bias_correction(loader, model)
        return model

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """Outputs in Brevitas' inference mode."""
        from cora_plugin.integrations.brevitas.recipe import logits

        return logits(model, images)


TOOLKITS: dict[str, Toolkit] = {"brevitas": Brevitas()}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the toolkits' progress bars and warnings out of the tables."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
