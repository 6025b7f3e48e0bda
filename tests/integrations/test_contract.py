"""What every host owes the algorithm; the toolkits that are installed are tested."""

import copy
from importlib.util import find_spec

import pytest
import torch
from host_checks import (
    LAYERS,
    assert_same_state,
    factored,
    float_weights,
    run,
    whole,
)
from torch import nn

from cora_plugin import CoRa, CoRaError, load_adapters, save_adapters
from cora_plugin.adapters import Adapter, Kind, QuantizedTensor, make_adapter, truncate
from cora_plugin.adapters.factor import Weighting
from cora_plugin.layer import Correction


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


class Contract:
    """The suite; a subclass brings a toolkit."""

    @pytest.fixture
    def model(self, prototype):
        return copy.deepcopy(prototype)

    @pytest.fixture
    def host(self, model, batches):
        return self.host_of(model, batches)

    def test_hands_over_every_layer(self, host, prototype):
        assert [layer.name for layer in host.layers] == LAYERS
        assert not host.skipped
        for layer in host.layers:
            assert layer.weight.shape == layer.dequantized.shape
            assert 0 < layer.residual.norm() < layer.weight.norm()
            assert layer.weight_bits in (4, 8)  # 8 at Brevitas' first layer
            assert layer.scale_bits == 32 * layer.weight.shape[0]

    @pytest.mark.parametrize("mode", ["quantized", "float weights"])
    def test_weights_are_those_of_the_forward_pass(self, host, mode, unseen):
        seen = {}
        with torch.no_grad(), host.prepared():
            expected = host.run(unseen)
            watch = host.observe(lambda name, x, y: seen.update({name: (x, y)}))
            if mode == "quantized":
                with watch:
                    assert torch.equal(host.run(unseen), expected)
            else:
                with float_weights(host), watch:
                    host.run(unseen)
        assert list(seen) == LAYERS
        for layer in host.layers:
            x, y = seen[layer.name]
            weight = layer.dequantized if mode == "quantized" else layer.weight
            bias = y - layer.operation(x, weight)
            constant = bias.mean([0, *range(2, bias.ndim)], keepdim=True)
            assert (bias - constant).abs().max() < 1e-5 * y.abs().max(), layer.name

    def test_float_model_is_the_float_net(self, host, float_net, unseen):
        with host.prepared(), torch.no_grad(), host.float_model():
            output = host.run(unseen)
            torch.testing.assert_close(output, float_net(unseen), atol=1e-4, rtol=1e-4)

    def test_other_weights_for_some_layers_leave_the_rest(self, host, unseen):
        seen = {}
        with torch.no_grad(), host.prepared():
            expected = host.run(unseen)
            layers = {layer.name: layer for layer in host.layers}
            same = {name: layers[name].dequantized for name in ("stem", "dilated")}
            with host.weights(same):
                # Biases are float here, and round otherwise.
                torch.testing.assert_close(
                    host.run(unseen), expected, atol=0.02, rtol=0.02
                )
            values = {"depthwise": layers["depthwise"].weight.flip(0)}
            with (
                host.weights(values),
                host.observe(lambda name, x, y: seen.update({name: (x, y)})),
            ):
                host.run(unseen)
            assert torch.equal(host.run(unseen), expected)
        for name, layer in layers.items():
            x, y = seen[name]
            bias = y - layer.operation(x, values.get(name, layer.dequantized))
            constant = bias.mean([0, *range(2, bias.ndim)], keepdim=True)
            assert (bias - constant).abs().max() < 1e-5 * y.abs().max(), name

    def test_gradients_reach_the_weights_that_are_tried(self, host, model, unseen):
        before, output = state(model), run(model, unseen)
        seen = {}
        with host.prepared():
            values = {e.name: e.weight.clone().requires_grad_() for e in host.layers}
            with (
                host.weights(values),
                host.observe(lambda name, x, y: seen.update({name: x.detach()})),
            ):
                loss = host.run(unseen).square().sum() / 2
                loss.backward()
                logits = host.run(unseen).detach()
            # y = W x + b at the head, so the gradient there is known exactly.
            expected = logits.T @ seen["head"].flatten(1)
            torch.testing.assert_close(
                values["head"].grad, expected, atol=1e-3, rtol=1e-3
            )
            # Rounding is passed straight: about what float activations would give.
            floats = {name: w.detach().clone() for name, w in values.items()}
            for name, value in values.items():
                assert torch.isfinite(value.grad).all()
                step = 1e-2 * value.grad / value.grad.norm()
                with torch.no_grad(), host.weights({**floats, name: value + step}):
                    rise = host.run(unseen).square().sum() / 2 - loss.detach()
                slope = float(rise / (step * value.grad).sum())
                assert 0.5 < slope < 2, (name, slope)
        assert_same_state(model, before)
        assert torch.equal(run(model, unseen), output)

    def test_a_model_with_channels_last_is_treated_alike(self, prototype, batches):
        reports, outputs = [], []
        for layout in (torch.contiguous_format, torch.channels_last):
            model = copy.deepcopy(prototype).to(memory_format=layout)
            x = batches[0][0].contiguous(memory_format=layout)
            reports.append(
                CoRa("budget=0.2").apply(self.host_of(model, batches), batches)
            )
            outputs.append(run(model, x))
            for name, _ in prototype.named_parameters():
                weight = model.get_parameter(name)
                if weight.ndim == 4:
                    assert weight.is_contiguous(memory_format=layout), name
        one, other = ([row.rank for row in report.layers] for report in reports)
        assert one == other
        apart = (outputs[0] - outputs[1]).norm() / outputs[0].norm()
        assert apart < 0.02  # a rounding tie here and there

    def test_learns_ranks(self, host, model, batches, unseen):
        before, output = state(model), run(model, unseen)
        config = "budget=0.2,search=butterworth,butterworth.iterations=20"
        report = CoRa(config).apply(host, batches)
        assert report.steps[0].kept
        assert report.after.kl < 0.7 * report.before.kl
        assert 0 < report.budget_used <= report.budget_allowed
        assert report.search_iterations == 20
        host.remove()
        assert_same_state(model, before)
        assert torch.equal(run(model, unseen), output)

    def test_a_diverging_search_leaves_the_model(self, host, model, batches, unseen):
        before, output = state(model), run(model, unseen)
        config = "budget=0.2,search=butterworth,butterworth.gamma=1.7e308"
        config += ",butterworth.initial_cutoff=1"
        with pytest.raises(CoRaError, match=r"lower butterworth\.lr"):
            CoRa(config).apply(host, batches)
        assert_same_state(model, before)
        assert torch.equal(run(model, unseen), output)

    def test_modes_end_with_their_block(self, host, model, unseen):
        before, output = state(model), run(model, unseen)
        with pytest.raises(ZeroDivisionError), host.prepared(), host.float_model():
            with host.observe(lambda *_: None):
                _ = 1 / 0
        assert_same_state(model, before)
        assert torch.equal(run(model, unseen), output)

    @pytest.mark.parametrize("make", [whole, factored])
    def test_full_rank_restores_the_float_weights(self, host, make, unseen):
        with torch.no_grad(), host.prepared():
            with float_weights(host):
                expected = host.run(unseen)
            plain = host.run(unseen)
            host.insert(Correction(make(host)))
            output = host.run(unseen)
        error = (output - expected).abs().mean()
        # A rounding difference may tip an activation to its next level.
        assert error < 0.02 * (plain - expected).abs().mean()

    def test_no_adapters_change_nothing(self, host, model, unseen):
        before, output = state(model), run(model, unseen)
        host.insert(Correction())
        assert_same_state(model, before)
        assert torch.equal(run(model, unseen), output)

    def test_adapters_help_and_can_be_removed(self, host, model, batches, unseen):
        before, output = state(model), run(model, unseen)
        report = CoRa("budget=0.3").apply(host, batches)
        assert report.steps[0].kept
        assert report.after.kl < 0.5 * report.before.kl
        assert not torch.equal(run(model, unseen), output)
        host.remove()
        assert_same_state(model, before)
        assert torch.equal(run(model, unseen), output)

    def test_biases_are_corrected_without_adapters(self, host, model, unseen):
        before, output = state(model), run(model, unseen)
        host.insert(Correction(shifts={"head": torch.arange(10.0)}))
        shifted = run(copy.deepcopy(model), unseen)
        torch.testing.assert_close(shifted, output + torch.arange(10.0))
        host.remove()
        assert_same_state(model, before)
        assert torch.equal(run(model, unseen), output)

    def test_deepcopy_keeps_the_adapters(self, host, model, batches, unseen):
        CoRa("budget=0.3").apply(host, batches)
        assert torch.equal(run(copy.deepcopy(model), unseen), run(model, unseen))

    def test_file_round_trip(self, model, prototype, batches, unseen, tmp_path):
        report = self.apply(batches, model)
        assert any(row.rank for row in report.layers)
        self.save(tmp_path / "adapters.safetensors", model)
        other = copy.deepcopy(prototype)
        self.load(tmp_path / "adapters.safetensors", other, batches)
        expected, output = run(model, unseen), run(other, unseen)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)

    def test_a_file_holds_the_bias_correction(
        self, host, model, prototype, batches, unseen, tmp_path
    ):
        # Shifts of our own: whether the guard keeps a correction is up to the data.
        shifts = {layer.name: torch.randn(len(layer.weight)) for layer in host.layers}
        host.insert(Correction(whole(host), shifts))
        self.save(tmp_path / "adapters.safetensors", model)
        stored = load_adapters(tmp_path / "adapters.safetensors")[1]
        assert stored.keys() == shifts.keys()
        assert all(torch.equal(stored[name], shifts[name]) for name in shifts)
        other = copy.deepcopy(prototype)
        self.load(tmp_path / "adapters.safetensors", other, batches)
        torch.testing.assert_close(run(other, unseen), run(model, unseen))

    @pytest.mark.parametrize(("name", "size"), [("head", 9), ("nowhere", 10)])
    def test_a_file_that_corrects_other_outputs_is_refused(
        self, model, batches, tmp_path, name, size
    ):
        before = state(model)
        save_adapters(tmp_path / "file", {}, {name: torch.ones(size)})
        with pytest.raises(CoRaError, match=f"^{name}: "):
            self.load(tmp_path / "file", model, batches)
        assert_same_state(model, before)

    def test_a_file_is_refused_by_other_weights(
        self, model, prototype, batches, tmp_path
    ):
        self.apply(batches, model)
        self.save(tmp_path / "adapters.safetensors", model)
        other = copy.deepcopy(prototype)
        torch.manual_seed(0)
        for name in LAYERS:
            weight = other.get_parameter(f"{name}.weight").data
            weight += 0.1 * weight.std() * torch.randn_like(weight)
        before = state(other)
        with pytest.raises(CoRaError, match="for a weight whose integers are others"):
            self.load(tmp_path / "adapters.safetensors", other, batches)
        assert_same_state(other, before)

    def test_failing_data_leaves_the_model(self, host, model, batches, unseen):
        before, output = state(model), run(model, unseen)
        broken = [*batches[:2], (torch.full_like(batches[0][0], torch.nan), None)]
        with pytest.raises(CoRaError, match="item 2 holds NaN"):
            CoRa().apply(host, broken)
        assert_same_state(model, before)
        assert torch.equal(run(model, unseen), output)

    @pytest.mark.parametrize(
        ("name", "shape", "groups", "message"),
        [
            ("head", (2, 2), 1, r"for a weight of shape \[2, 2\], the layer's is \["),
            ("dilated", (32, 8, 3, 3), 1, "for 1 groups, the layer has 4"),
            ("nowhere", (2, 2), 1, "the model has no quantized layer of this name"),
        ],
    )
    def test_failing_insertion_leaves_the_model(
        self, host, model, unseen, name, shape, groups, message
    ):
        before, output = state(model), run(model, unseen)
        adapters = whole(host)
        stored = QuantizedTensor(torch.zeros(shape), None, 32)
        adapters[name] = Adapter(Kind.FULL, 1, stored, None, shape, groups)
        with pytest.raises(CoRaError, match=f"^{name}: .*{message}"):
            host.insert(Correction(adapters))
        assert_same_state(model, before)
        assert torch.equal(run(model, unseen), output)

    def test_refuses_adapters_twice(self, host, model, batches):
        adapters = whole(host)
        host.insert(Correction(adapters))
        with pytest.raises(CoRaError, match="already carries an adapter"):
            host.insert(Correction(adapters))
        with pytest.raises(CoRaError, match="already carries an adapter"):
            self.host_of(model, batches)

    def test_refuses_a_float_model(self, float_net, batches):
        with pytest.raises(
            CoRaError, match=r"nothing in it is quantized|not quantized"
        ):
            CoRa().apply(self.host_of(float_net, batches), batches)


def brevitas_host(model, batches):
    from cora_plugin.integrations.brevitas import BrevitasHost

    return BrevitasHost(model)


def nncf_host(model, batches):
    from cora_plugin.integrations.nncf import NNCFHost

    return NNCFHost(model, batches[0][0])


def nncf_quantize(net, batches):
    from cora_plugin.integrations.nncf import quantize_ptq

    return quantize_ptq(
        net, batches, depthwise_bits=None, first_last_bits=None, weight_quantile=None
    )


@pytest.fixture(scope="module")
def brevitas_prototype(quantize):
    return quantize("layerwise", bias_bits=None)


@pytest.fixture(scope="module")
def nncf_prototype(float_net, batches):
    return nncf_quantize(float_net, batches)


if find_spec("brevitas"):

    class TestBrevitas(Contract):
        """Brevitas keeps this contract."""

        host_of = staticmethod(brevitas_host)

        @pytest.fixture
        def prototype(self, brevitas_prototype):
            return brevitas_prototype

        def apply(self, batches, model):
            from cora_plugin.integrations.brevitas import apply_cora

            return apply_cora(batches, model, "budget=0.3")

        def save(self, path, model):
            from cora_plugin.integrations.brevitas import save_cora

            save_cora(path, model)

        def load(self, path, model, batches):
            from cora_plugin.integrations.brevitas import load_cora

            load_cora(path, model)


if find_spec("nncf"):

    class TestNNCF(Contract):
        """NNCF keeps this contract."""

        host_of = staticmethod(nncf_host)

        @pytest.fixture
        def prototype(self, nncf_prototype):
            return nncf_prototype

        def apply(self, batches, model):
            from cora_plugin.integrations.nncf import apply_cora

            return apply_cora(model, batches, "budget=0.3")

        def save(self, path, model):
            from cora_plugin.integrations.nncf import save_cora

            save_cora(path, model)

        def load(self, path, model, batches):
            from cora_plugin.integrations.nncf import load_cora

            load_cora(path, model, batches[0][0])


if find_spec("brevitas") and find_spec("nncf"):

    def test_hosts_agree(float_net, quantize, batches):
        """Same weights, same quantizers: same W, Wq and adapters."""
        # NNCF's own range: from -7 to 7, not from -8.
        brevitas = brevitas_host(quantize(weight_narrow_range=True), batches)
        net = copy.deepcopy(float_net)
        for layer in brevitas.layers:  # equalized, batch norms merged
            net.get_submodule(layer.name).weight.data.copy_(layer.weight)
        net.stem_bn = net.depthwise_bn = nn.Identity()
        nncf = nncf_host(nncf_quantize(net, batches), batches)
        pairs = list(zip(brevitas.layers, nncf.layers, strict=True))
        for one, other in pairs[1:]:  # Brevitas gives its first layer 8 bits
            assert one.name == other.name
            assert one.weight_bits == other.weight_bits
            assert one.scale_bits == other.scale_bits
            torch.testing.assert_close(one.weight, other.weight)
            torch.testing.assert_close(one.dequantized, other.dequantized)
            factors = [truncate(e.matrices, 2, Weighting()) for e in (one, other)]
            ours, theirs = (b @ a for a, b in factors)
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
            # W and Wq agree to the last bit or two, so that a factor's entry midway
            # between two integers may become the one here and the other there.
            made = [
                make_adapter(e.residual, e.operation, 2, Weighting(), 8, e.name)
                for e in (one, other)
            ]
            assert made[0].stored_bits == made[1].stored_bits
            stored = (adapter.tensors.items() for adapter in made)
            for (key, ours), (_, theirs) in zip(*stored, strict=True):
                torch.testing.assert_close(ours.scale, theirs.scale)
                # Both factors of a rank may change their sign.
                apart = ours.values.int().abs() - theirs.values.int().abs()
                assert apart.abs().max() <= 1, (one.name, key)
                assert apart.abs().sum() <= 2, (one.name, key)
            x = torch.randn(2, 32, 8, 8)[
                :, : one.weight.shape[1] * one.operation.groups
            ]
            if one.operation.dimensions and one.name != "reflect":
                ours, theirs = (e.operation(x, e.weight) for e in (one, other))
                torch.testing.assert_close(ours, theirs)
