"""NNCF's PTQ, with the place of the adapters in it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cora_plugin.integrations.nncf.algorithm import apply_cora
from cora_plugin.integrations.nncf.extension import is_compiled, load_extension
from cora_plugin.integrations.nncf.recipe import quantize_ptq
from cora_plugin.integrations.ptq import AbstractPTQ, options_of
from cora_plugin.report import Report


class PTQ(AbstractPTQ):
    """`nncf.quantize`; with adapters, biases are corrected after them, guarded."""

    title = "NNCF"
    onnx_exporter = "export_onnx"
    hints = options_of(quantize_ptq)

    @classmethod
    def first_use(cls) -> Sequence[tuple[str, Callable[[], None]]]:
        """Compile NNCF's C++ extension."""
        if is_compiled():
            return ()
        notice = "NNCF compiles its C++ extension, a minute or two, once"
        return ((notice, load_extension),)

    def quantize(self) -> nn.Module:
        """PTQ without bias correction, which adapters would have to undo."""
        return self._quantize(bias_correction=False)

    def corrected(self, model: nn.Module) -> nn.Module:
        """Quantized anew, for bias correction is a part of `nncf.quantize`."""
        return self._quantize(bias_correction=True)

    def _quantize(self, bias_correction: bool) -> nn.Module:
        options = {**self.options, "bias_correction": bias_correction}
        return quantize_ptq(self.net, self.loader, **options)

    def adapt(self, model: nn.Module, config: Any) -> Report:
        """Adapters, then bias correction where it helps, unless it is refused."""
        correct = self.options.get("bias_correction", True)
        return apply_cora(model, self.loader, config, bias_correction=correct)

    @staticmethod
    @torch.no_grad()
    def logits(model: nn.Module, images: Tensor) -> Tensor:
        """Outputs of the model."""
        return torch.cat([model(batch) for batch in images.split(32)])
