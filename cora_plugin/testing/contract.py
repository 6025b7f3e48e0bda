"""The tests that every host must pass."""

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from cora_plugin.adapters import (
    Adapter,
    load_adapters,
    save_adapters,
)
from cora_plugin.adapters.errors import CoRaError, ModelError
from cora_plugin.adapters.form import Form
from cora_plugin.algorithm import CoRa
from cora_plugin.host import Host
from cora_plugin.layer import Correction
from cora_plugin.outputs import only
from cora_plugin.report import Report
from cora_plugin.testing.checks import (
    assert_same_state,
    factored,
    float_weights,
    series,
    state,
    whole,
)
from cora_plugin.testing.kinds import KINDS, net_of
from cora_plugin.testing.net import LAYERS, Net, images, trained

Batches = Sequence[tuple[Tensor, Tensor]]


_PROTOTYPES: dict[type, nn.Module] = {}
"""Quantized nets by suite."""


def _two_terms(host: Host) -> dict[str, Adapter]:
    """Adapters whose second term has all that the first, of rank 1, leaves."""
    return series(host, (1, 8), 32)


@functools.cache
def _taught() -> nn.Module:
    torch.manual_seed(0)
    return trained(Net())


class HostContract:
    """The suite; a subclass brings a toolkit.

    It must implement `quantized` and `host_of`, and may implement the others, where the
    toolkit has an idiom of its own. `requantizes` says whether the host can quantize
    other main weights; `bits` which widths the layers of a quantized `Net` may have;
    `unsupported` which of `KINDS` of layers the toolkit does not quantize.
    """

    unsupported: ClassVar[frozenset[str]] = frozenset()
    requantizes: ClassVar[bool] = False
    bits: ClassVar[frozenset[int]] = frozenset({4})

    def quantized(self, net: nn.Module, batches: Batches) -> nn.Module:
        """A copy of a float net, quantized at 4 bits with a scale a channel."""
        raise NotImplementedError

    def host_of(self, model: nn.Module, batches: Batches) -> Host:
        """The host of a quantized model."""
        raise NotImplementedError

    def apply(self, batches: Batches, model: nn.Module) -> Report:
        """Give a model adapters by the toolkit's idiom, at 30 % of the parameters."""
        return CoRa("budget=0.3").apply(self.host_of(model, batches), batches)

    def save(self, path: Path, model: nn.Module) -> None:
        """Save the adapters of a model."""
        raise NotImplementedError

    def load(self, path: Path, model: nn.Module, batches: Batches) -> None:
        """Load adapters into a model."""
        raise NotImplementedError

    @torch.no_grad()
    def answer(self, model: nn.Module, x: Tensor) -> Tensor:
        """A model's output as a plain tensor."""
        y: Tensor = model(x)
        return y

    @pytest.fixture(scope="session")
    @classmethod
    def batches(cls) -> Batches:
        """Calibration data as loaders yield it."""
        return [(x, torch.zeros(len(x))) for x in images(64, seed=2).split(16)]

    @pytest.fixture(scope="session")
    @classmethod
    def unseen(cls) -> Tensor:
        """Images that calibrate nothing."""
        return images(64, seed=3)

    @pytest.fixture(scope="session")
    @classmethod
    def float_net(cls) -> nn.Module:
        """The float net."""
        return _taught()

    @pytest.fixture
    def prototype(self, float_net: nn.Module, batches: Batches) -> nn.Module:
        """The quantized net; copied before it is used."""
        if type(self) not in _PROTOTYPES:
            _PROTOTYPES[type(self)] = self.quantized(float_net, batches)
        return _PROTOTYPES[type(self)]

    @pytest.fixture
    def model(self, prototype: nn.Module) -> nn.Module:
        """A quantized net."""
        return copy.deepcopy(prototype)

    @pytest.fixture
    def host(self, model: nn.Module, batches: Batches) -> Host:
        """Its host."""
        return self.host_of(model, batches)

    def test_hands_over_every_layer(self, host: Host, prototype: nn.Module) -> None:
        assert [layer.name for layer in host.layers] == list(LAYERS)
        assert not host.skipped
        for layer in host.layers:
            assert layer.weight.shape == layer.dequantized.shape
            assert 0 < layer.residual.norm() < layer.weight.norm()
            assert layer.weight_bits in self.bits
            assert layer.scale_bits == 32 * layer.weight.shape[0]

    @pytest.mark.parametrize("mode", ["quantized", "float weights"])
    def test_weights_are_those_of_the_forward_pass(
        self, host: Host, mode: str, unseen: Tensor
    ) -> None:
        seen = {}
        with torch.no_grad(), host.prepared():
            expected = only(host.run(unseen))
            watch = host.observe(lambda name, x, y: seen.update({name: (x, y)}))
            if mode == "quantized":
                with watch:
                    assert torch.equal(only(host.run(unseen)), expected)
            else:
                with float_weights(host), watch:
                    only(host.run(unseen))
        assert list(seen) == list(LAYERS)
        for layer in host.layers:
            x, y = seen[layer.name]
            weight = layer.dequantized if mode == "quantized" else layer.weight
            bias = y - layer.operation(x, weight)
            constant = bias.mean([0, *range(2, bias.ndim)], keepdim=True)
            assert (bias - constant).abs().max() < 1e-5 * y.abs().max(), layer.name

    def test_float_model_is_the_float_net(
        self, host: Host, float_net: nn.Module, unseen: Tensor
    ) -> None:
        with host.prepared(), torch.no_grad(), host.acting(quantized=False):
            output = only(host.run(unseen))
            torch.testing.assert_close(output, float_net(unseen), atol=1e-4, rtol=1e-4)

    def test_other_weights_for_some_layers_leave_the_rest(
        self, host: Host, unseen: Tensor
    ) -> None:
        seen = {}
        with torch.no_grad(), host.prepared():
            expected = only(host.run(unseen))
            layers = {layer.name: layer for layer in host.layers}
            same = {name: layers[name].dequantized for name in ("stem", "dilated")}
            with host.acting(same):
                # Biases are float here, and round otherwise.
                torch.testing.assert_close(
                    only(host.run(unseen)), expected, atol=0.02, rtol=0.02
                )
            values = {"depthwise": layers["depthwise"].weight.flip(0)}
            with (
                host.acting(values),
                host.observe(lambda name, x, y: seen.update({name: (x, y)})),
            ):
                only(host.run(unseen))
            assert torch.equal(only(host.run(unseen)), expected)
        for name, layer in layers.items():
            x, y = seen[name]
            bias = y - layer.operation(x, values.get(name, layer.dequantized))
            constant = bias.mean([0, *range(2, bias.ndim)], keepdim=True)
            assert (bias - constant).abs().max() < 1e-5 * y.abs().max(), name

    def test_gradients_reach_the_weights_that_are_tried(
        self, host: Host, model: nn.Module, unseen: Tensor
    ) -> None:
        before, output = state(model), self.answer(model, unseen)
        seen = {}
        with host.prepared():
            values = {e.name: e.weight.clone().requires_grad_() for e in host.layers}
            with (
                host.acting(values),
                host.observe(lambda name, x, y: seen.update({name: x.detach()})),
            ):
                loss = only(host.run(unseen)).square().sum() / 2
                loss.backward()
                logits = only(host.run(unseen)).detach()
            # y = W x + b at the head, so the gradient there is known exactly.
            expected = logits.T @ seen["head"].flatten(1)
            torch.testing.assert_close(
                values["head"].grad, expected, atol=1e-3, rtol=1e-3
            )
            # Rounding is passed straight: about what float activations would give.
            floats = {name: w.detach().clone() for name, w in values.items()}
            for name, value in values.items():
                slopes = value.grad
                assert slopes is not None and torch.isfinite(slopes).all()
                step = 1e-2 * slopes / slopes.norm()
                with torch.no_grad(), host.acting({**floats, name: value + step}):
                    rise = only(host.run(unseen)).square().sum() / 2 - loss.detach()
                slope = float(rise / (step * slopes).sum())
                assert 0.5 < slope < 2, (name, slope)
        assert_same_state(model, before)
        assert torch.equal(self.answer(model, unseen), output)

    def test_a_model_with_channels_last_is_treated_alike(
        self, prototype: nn.Module, batches: Batches
    ) -> None:
        reports, outputs = [], []
        for layout in (torch.contiguous_format, torch.channels_last):
            model = copy.deepcopy(prototype).to(memory_format=layout)
            x = batches[0][0].contiguous(memory_format=layout)
            reports.append(
                CoRa("budget=0.2").apply(self.host_of(model, batches), batches)
            )
            outputs.append(self.answer(model, x))
            for name, _ in prototype.named_parameters():
                weight = model.get_parameter(name)
                if weight.ndim == 4:
                    assert weight.is_contiguous(memory_format=layout), name
        one, other = ([row.rank for row in report.layers] for report in reports)
        assert one == other
        apart = (outputs[0] - outputs[1]).norm() / outputs[0].norm()
        assert apart < 0.02  # a rounding tie here and there

    def test_learns_ranks(
        self, host: Host, model: nn.Module, batches: Batches, unseen: Tensor
    ) -> None:
        before, output = state(model), self.answer(model, unseen)
        config = "budget=0.2,search=butterworth,butterworth.iterations=20"
        report = CoRa(config).apply(host, batches)
        assert report.steps[0].kept
        assert report.after.kl < 0.7 * report.before.kl
        assert 0 < report.budget_used <= report.budget_allowed
        assert report.search_iterations == 20
        host.correct(Correction())
        assert_same_state(model, before)
        assert torch.equal(self.answer(model, unseen), output)

    def test_a_diverging_search_leaves_the_model(
        self, host: Host, model: nn.Module, batches: Batches, unseen: Tensor
    ) -> None:
        before, output = state(model), self.answer(model, unseen)
        config = "budget=0.2,search=butterworth,butterworth.gamma=1.7e308"
        config += ",butterworth.initial_cutoff=1"
        with pytest.raises(CoRaError, match=r"lower butterworth\.lr"):
            CoRa(config).apply(host, batches)
        assert_same_state(model, before)
        assert torch.equal(self.answer(model, unseen), output)

    def test_modes_end_with_their_block(
        self, host: Host, model: nn.Module, unseen: Tensor
    ) -> None:
        before, output = state(model), self.answer(model, unseen)
        with (
            pytest.raises(ZeroDivisionError),
            host.prepared(),
            host.acting(quantized=False),
        ):
            with host.observe(lambda *_: None):
                _ = 1 / 0
        assert_same_state(model, before)
        assert torch.equal(self.answer(model, unseen), output)

    @pytest.mark.parametrize("make", [whole, factored, _two_terms])
    def test_full_rank_restores_the_float_weights(
        self, host: Host, make: Any, unseen: Tensor
    ) -> None:
        with torch.no_grad(), host.prepared():
            with float_weights(host):
                expected = only(host.run(unseen))
            plain = only(host.run(unseen))
            host.correct(Correction(make(host)))
            output = only(host.run(unseen))
        error = (output - expected).abs().mean()
        # A rounding difference may tip an activation to its next level.
        assert error < 0.02 * (plain - expected).abs().mean()

    @pytest.mark.parametrize("kind", KINDS)
    def test_every_kind_of_layer_is_served(
        self, kind: str, batches: Batches, unseen: Tensor
    ) -> None:
        if kind in self.unsupported:
            pytest.skip(f"the toolkit does not quantize: {kind}")
        model = self.quantized(net_of(kind), batches)
        host = self.host_of(model, batches)
        assert not host.skipped
        names = [layer.name.partition("/")[0] for layer in host.layers]
        assert {*names} == {"stem", "layer", "head"}
        before = state(model)
        with torch.no_grad(), host.prepared():
            with float_weights(host):
                expected = only(host.run(unseen))
            plain = only(host.run(unseen))
            for make in (whole, factored):
                host.correct(Correction(make(host)))
                error = (only(host.run(unseen)) - expected).abs().mean()
                assert error < 0.05 * (plain - expected).abs().mean(), make
            host.correct(Correction())
        assert_same_state(model, before)
        report = CoRa("budget=0.4").apply(host, batches)
        assert report.after.value < 0.6 * report.before.value
        assert all(row.macs or not row.rank for row in report.layers)

    def test_no_adapters_change_nothing(
        self, host: Host, model: nn.Module, unseen: Tensor
    ) -> None:
        before, output = state(model), self.answer(model, unseen)
        host.correct(Correction())
        assert_same_state(model, before)
        assert torch.equal(self.answer(model, unseen), output)

    def test_adapters_help_and_can_be_removed(
        self, host: Host, model: nn.Module, batches: Batches, unseen: Tensor
    ) -> None:
        before, output = state(model), self.answer(model, unseen)
        report = CoRa("budget=0.3").apply(host, batches)
        assert report.steps[0].kept
        assert report.after.kl < 0.5 * report.before.kl
        assert not torch.equal(self.answer(model, unseen), output)
        host.correct(Correction())
        assert_same_state(model, before)
        assert torch.equal(self.answer(model, unseen), output)

    def test_biases_are_corrected_without_adapters(
        self, host: Host, model: nn.Module, unseen: Tensor
    ) -> None:
        before, output = state(model), self.answer(model, unseen)
        host.correct(Correction(shifts={"head": torch.arange(10.0)}))
        shifted = self.answer(copy.deepcopy(model), unseen)
        torch.testing.assert_close(shifted, output + torch.arange(10.0))
        host.correct(Correction())
        assert_same_state(model, before)
        assert torch.equal(self.answer(model, unseen), output)

    def test_deepcopy_keeps_the_adapters(
        self, host: Host, model: nn.Module, batches: Batches, unseen: Tensor
    ) -> None:
        CoRa("budget=0.3").apply(host, batches)
        assert torch.equal(
            self.answer(copy.deepcopy(model), unseen), self.answer(model, unseen)
        )

    def test_file_round_trip(
        self,
        model: nn.Module,
        prototype: nn.Module,
        batches: Batches,
        unseen: Tensor,
        tmp_path: Path,
    ) -> None:
        report = self.apply(batches, model)
        assert any(row.rank for row in report.layers)
        self.save(tmp_path / "adapters.safetensors", model)
        other = copy.deepcopy(prototype)
        self.load(tmp_path / "adapters.safetensors", other, batches)
        expected, output = self.answer(model, unseen), self.answer(other, unseen)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)

    def test_terms_add_up_and_come_back_from_a_file(
        self,
        host: Host,
        model: nn.Module,
        prototype: nn.Module,
        batches: Batches,
        unseen: Tensor,
        tmp_path: Path,
    ) -> None:
        adapters = series(host, (2, 8), 3, 2)
        layers = {layer.name: layer for layer in host.layers}
        merged = {
            name: layers[name].dequantized + adapter.merged()
            for name, adapter in adapters.items()
        }
        with torch.no_grad(), host.prepared():
            with host.acting(merged):
                expected = only(host.run(unseen))
            plain = only(host.run(unseen))
            host.correct(Correction(adapters))
            output = only(host.run(unseen))
        error = (output - expected).abs().mean()
        # A rounding difference may tip an activation to its next level.
        assert error < 0.05 * (plain - expected).abs().mean()
        self.save(tmp_path / "adapters.safetensors", model)
        other = copy.deepcopy(prototype)
        self.load(tmp_path / "adapters.safetensors", other, batches)
        torch.testing.assert_close(
            self.answer(other, unseen), self.answer(model, unseen)
        )
        stored = load_adapters(tmp_path / "adapters.safetensors")[0]
        for name, adapter in adapters.items():
            assert str(stored[name]) == str(adapter)
            for key, tensor in adapter.tensors.items():
                found = stored[name].tensors[key]
                assert torch.equal(found.values, tensor.values), (name, key)

    def test_a_file_holds_the_bias_correction(
        self,
        host: Host,
        model: nn.Module,
        prototype: nn.Module,
        batches: Batches,
        unseen: Tensor,
        tmp_path: Path,
    ) -> None:
        # Shifts of our own: whether the guard keeps a correction is up to the data.
        shifts = {layer.name: torch.randn(len(layer.weight)) for layer in host.layers}
        host.correct(Correction(whole(host), shifts))
        self.save(tmp_path / "adapters.safetensors", model)
        stored = load_adapters(tmp_path / "adapters.safetensors")[1]
        assert stored.keys() == shifts.keys()
        assert all(torch.equal(stored[name], shifts[name]) for name in shifts)
        other = copy.deepcopy(prototype)
        self.load(tmp_path / "adapters.safetensors", other, batches)
        torch.testing.assert_close(
            self.answer(other, unseen), self.answer(model, unseen)
        )

    @pytest.mark.parametrize(("name", "size"), [("head", 9), ("nowhere", 10)])
    def test_a_file_that_corrects_other_outputs_is_refused(
        self, model: nn.Module, batches: Batches, tmp_path: Path, name: str, size: int
    ) -> None:
        before = state(model)
        save_adapters(tmp_path / "file", {}, {name: torch.ones(size)})
        with pytest.raises(CoRaError, match=f"^{name}: "):
            self.load(tmp_path / "file", model, batches)
        assert_same_state(model, before)

    def test_a_file_is_refused_by_other_weights(
        self, model: nn.Module, prototype: nn.Module, batches: Batches, tmp_path: Path
    ) -> None:
        self.apply(batches, model)
        self.save(tmp_path / "adapters.safetensors", model)
        other = copy.deepcopy(prototype)
        torch.manual_seed(0)
        for name in LAYERS:
            weight = other.get_parameter(f"{name}.weight").data
            weight += 0.1 * weight.std() * torch.randn_like(weight)
        before = state(other)
        with pytest.raises(CoRaError, match=r"for a weight (whose integers|of other)"):
            self.load(tmp_path / "adapters.safetensors", other, batches)
        assert_same_state(other, before)

    def test_failing_data_leaves_the_model(
        self, host: Host, model: nn.Module, batches: Batches, unseen: Tensor
    ) -> None:
        before, output = state(model), self.answer(model, unseen)
        broken = [*batches[:2], (torch.full_like(batches[0][0], torch.nan), None)]
        with pytest.raises(CoRaError, match="item 2 holds NaN"):
            CoRa().apply(host, broken)
        assert_same_state(model, before)
        assert torch.equal(self.answer(model, unseen), output)

    @pytest.mark.parametrize(
        ("name", "shape", "groups", "message"),
        [
            ("head", (2, 2), 1, r"for a weight of shape \[2, 2\], the layer's is \["),
            ("dilated", (32, 8, 3, 3), 1, "for 1 groups, the layer has 4"),
            ("nowhere", (2, 2), 1, "the model has no quantized layer of this name"),
        ],
    )
    def test_failing_insertion_leaves_the_model(
        self,
        host: Host,
        model: nn.Module,
        unseen: Tensor,
        name: str,
        shape: tuple[int, ...],
        groups: int,
        message: str,
    ) -> None:
        before, output = state(model), self.answer(model, unseen)
        adapters = whole(host)
        form = Form.whole(32, shape, groups)
        adapters[name] = Adapter.of((form,), {"a": torch.zeros(shape)})
        with pytest.raises(CoRaError, match=rf"^{name}: .*{message}"):
            host.correct(Correction(adapters))
        assert_same_state(model, before)
        assert torch.equal(self.answer(model, unseen), output)

    def test_what_stood_still_stands_after_an_error(
        self, host: Host, model: nn.Module, unseen: Tensor
    ) -> None:
        host.correct(Correction(whole(host), {"head": torch.ones(10)}))
        before, output = state(model), self.answer(model, unseen)
        wrong = Correction(shifts={"head": torch.ones(9)})
        with pytest.raises(CoRaError, match=r"^head: "):
            host.correct(wrong)
        assert_same_state(model, before)
        assert torch.equal(self.answer(model, unseen), output)

    def test_a_correction_takes_the_place_of_another(
        self, host: Host, model: nn.Module, unseen: Tensor
    ) -> None:
        host.correct(Correction(shifts={"head": torch.arange(10.0)}))
        output = self.answer(model, unseen)
        host.correct(Correction(whole(host)))
        assert not torch.equal(self.answer(model, unseen), output)
        host.correct(Correction(shifts={"head": torch.arange(10.0)}))
        assert torch.equal(self.answer(model, unseen), output)

    def test_refuses_a_model_that_carries_adapters(
        self, host: Host, model: nn.Module, batches: Batches
    ) -> None:
        host.correct(Correction(whole(host)))
        with pytest.raises(CoRaError, match="already carries an adapter"):
            self.host_of(model, batches)

    def test_no_parameter_wants_a_gradient(self, host: Host, model: nn.Module) -> None:
        wanted = [parameter.requires_grad for parameter in model.parameters()]
        with host.prepared():
            assert not any(parameter.requires_grad for parameter in model.parameters())
        assert [parameter.requires_grad for parameter in model.parameters()] == wanted

    def test_quantizes_other_weights_by_its_own_quantizers(
        self, host: Host, model: nn.Module, unseen: Tensor
    ) -> None:
        if not self.requantizes:
            with pytest.raises(ModelError):
                host.quantize({"head": host.layers[-1].weight / 2})
            return
        before, output = state(model), self.answer(model, unseen)
        with host.prepared():
            floats = {layer.name: layer.weight for layer in host.layers}
            for layer in host.layers:
                again = host.quantize(floats)[layer.name]
                torch.testing.assert_close(again, layer.dequantized)
            changed = {"head": floats["head"] / 2}
            quantized = host.quantize(changed)
            host.correct(Correction(weights=changed, dequantized=quantized))
            seen = {}
            with host.observe(lambda name, x, y: seen.update({name: (x, y)})):
                host.run(unseen)
            x, y = seen["head"]
            head = host.layers[-1].operation(x, quantized["head"])
            bias = y - head
            assert (bias - bias.mean(0)).abs().max() < 1e-5 * y.abs().max()
            host.correct(Correction())
        assert_same_state(model, before)
        assert torch.equal(self.answer(model, unseen), output)

    def test_refuses_a_float_model(
        self, float_net: nn.Module, batches: Batches
    ) -> None:
        with pytest.raises(
            CoRaError, match=r"nothing in it is quantized|not quantized"
        ):
            CoRa().apply(self.host_of(float_net, batches), batches)
