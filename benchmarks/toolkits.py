"""What the benchmarks ask of a toolkit, in the same words for each."""

import contextlib
import copy
import io
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from cora_plugin import Report
from cora_plugin.layer import Host

METHODS: dict[str, dict[str, str]] = {
    "svd uniform": {"search": "uniform", "metric": "svd"},
    "qera-exact uniform": {"search": "uniform", "metric": "qera-exact"},
    "butterworth": {"search": "butterworth", "metric": "svd"},
    "spectral": {"search": "spectral", "metric": "qera-exact"},
}
"""Ways to choose adapters, by name; "none" is the toolkit alone."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Variant:
    """A quantized model and how it came about; seconds are those of all its steps."""

    recipe: str
    method: str
    model: nn.Module
    equivalent_bits: float
    seconds: float


class Toolkit(Protocol):
    """A toolkit's PTQ, its own ways to better it, and CoRa on top."""

    recipes: tuple[str, ...]

    def quantize(self, net: nn.Module, loader: Any, options: Any) -> nn.Module:
        """A quantized copy of a float network, by the plainest recipe."""

    def adapt(self, model: nn.Module, loader: Any, config: Any) -> Report:
        """Add adapters in place."""

    def remove(self, model: nn.Module) -> None:
        """Take them out again."""

    def host(self, model: nn.Module, images: Tensor) -> Host:
        """The model as the algorithm sees it."""

    def variants(
        self, net: nn.Module, loader: Any, options: Any, recipe: str
    ) -> Iterator[Variant]:
        """The model after one of `recipes`, without adapters and with each method's."""

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

    def adapt(self, model: nn.Module, loader: Any, config: Any) -> Report:
        """CoRa in place."""
        from cora_plugin.integrations.brevitas import apply_cora

        return apply_cora(loader, model, config)

    def remove(self, model: nn.Module) -> None:
        """What is left is Brevitas'."""
        from cora_plugin.integrations.brevitas import remove_cora

        remove_cora(model)

    def host(self, model: nn.Module, images: Tensor) -> Host:
        """A `BrevitasHost`."""
        from cora_plugin.integrations.brevitas.host import BrevitasHost

        return BrevitasHost(model)

    def variants(
        self, net: nn.Module, loader: Any, options: Any, recipe: str
    ) -> Iterator[Variant]:
        """Each model as it is, and after Brevitas' bias correction."""
        from brevitas_examples.imagenet_classification.ptq.ptq_common import (
            apply_bias_correction,
            apply_gptq,
        )

        base, seconds = timed(self.quantize, net, loader, options)
        if recipe == "gptq":
            _, more = timed(
                apply_gptq, loader, base, act_order=True, create_weight_orig=True
            )
            seconds += more
        # Brevitas corrects the biases here, in rows of their own.
        adapted = list(_adapted(self, base, loader, options, bias_correction="off"))
        bits = adapted[0][2].equivalent_bits_before if adapted else float("nan")
        rows = [("none", base, bits, seconds)]
        rows += [(name, m, r.equivalent_bits, s) for name, m, r, s in adapted]
        for name, model, here, spent in rows:
            yield Variant(recipe, name, model, here, spent)
            corrected = copy.deepcopy(model)
            _, more = timed(apply_bias_correction, loader, corrected)
            yield Variant(f"{recipe}+bc", name, corrected, here, spent + more)

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """Outputs in Brevitas' inference mode."""
        from cora_plugin.integrations.brevitas.recipe import logits

        return logits(model, images)


class NNCF:
    """`nncf.quantize` at low bits, with its range estimators and bias correction."""

    SETTINGS: Mapping[str, Mapping[str, Any]] = {
        "ptq": {},
        "ptq-histogram": {"act_range": "histogram"},
        "ptq-minmax": {"act_range": "minmax"},
        "ptq-unclipped": {"weight_quantile": None},
    }
    """What differs from `quantize_ptq`, which clips weights at their 0.3 % quantile."""

    recipes = tuple(SETTINGS)

    def quantize(
        self, net: nn.Module, loader: Any, options: Any, **settings: Any
    ) -> nn.Module:
        """Symmetric weights a channel, asymmetric activations, no bias correction."""
        from cora_plugin.integrations.nncf import quantize_ptq

        return quantize_ptq(
            net,
            loader,
            options.weight_bits,
            options.act_bits,
            options.depthwise_bits,
            **settings,
        )

    def adapt(self, model: nn.Module, loader: Any, config: Any) -> Report:
        """CoRa in place, its guarded bias correction after it."""
        from cora_plugin.integrations.nncf import apply_cora

        return apply_cora(model, loader, config)

    def remove(self, model: nn.Module) -> None:
        """What is left is NNCF's."""
        from cora_plugin.integrations.nncf import remove_cora

        remove_cora(model)

    def host(self, model: nn.Module, images: Tensor) -> Host:
        """An `NNCFHost`."""
        from cora_plugin.integrations.nncf.host import NNCFHost

        return NNCFHost(model, images)

    def variants(
        self, net: nn.Module, loader: Any, options: Any, recipe: str
    ) -> Iterator[Variant]:
        """NNCF alone, with its fast bias correction on every layer, and adapters."""
        settings = self.SETTINGS[recipe]
        base, seconds = timed(self.quantize, net, loader, options, **settings)
        adapted = list(_adapted(self, base, loader, options))
        bits = adapted[0][2].equivalent_bits_before if adapted else float("nan")
        yield Variant(recipe, "none", base, bits, seconds)
        corrected, seconds = timed(
            self.quantize, net, loader, options, bias_correction=True, **settings
        )
        yield Variant(f"{recipe}+bc", "none", corrected, bits, seconds)
        for name, model, report, spent in adapted:
            yield Variant(f"{recipe}+bc", name, model, report.equivalent_bits, spent)

    @torch.no_grad()
    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """Outputs of the model."""
        return torch.cat([model(batch) for batch in images.split(32)])


TOOLKITS: dict[str, Toolkit] = {"brevitas": Brevitas(), "nncf": NNCF()}


def _adapted(
    toolkit: Toolkit, base: nn.Module, loader: Any, options: Any, **more: Any
) -> Iterator[tuple[str, nn.Module, Report, float]]:
    for method in options.methods:
        model = copy.deepcopy(base)
        settings = {"budget": options.budget, **METHODS[method], **more}
        report, seconds = timed(toolkit.adapt, model, loader, settings)
        yield method, model, report, seconds


def timed(
    work: Callable[..., Result], *args: Any, **kwargs: Any
) -> tuple[Result, float]:
    """Do some work without a sound; return its result and its seconds."""
    with quiet():
        start = time.perf_counter()
        result = work(*args, **kwargs)
        return result, time.perf_counter() - start


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the toolkits' progress bars and warnings out of the tables."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
