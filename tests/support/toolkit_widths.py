"""What every toolkit owes plans of bit widths; a subclass names the toolkit."""

from dataclasses import replace

import pytest
import torch

from cora_plugin import CoRa, CoRaError
from cora_plugin.objective import KL, measure
from cora_plugin.testing.checks import assert_same_state

MENU = (3, 4, 5, 6, 8)

SAME_SIZE = {"budget": "1.0 ptq", "menu": MENU}


class PlansWidths:
    """Other widths are tried as the toolkit quantizes at them, and planned."""

    toolkit = None
    options = None

    def applied(self, model, batches, config, **keywords):
        """Call the toolkit's `apply_cora`."""
        raise NotImplementedError

    def bits_a_weight(self, base, batches):
        """What plain PTQ stores."""
        host = self.toolkit.host(base.model, batches[0][0][:1], base.reference)
        stored = sum(layer.stored_bits for layer in host.layers)
        return stored / sum(layer.weight.numel() for layer in host.layers)

    def widths(self, model, batches):
        """The bit width of each layer."""
        layers = self.toolkit.host(model, batches[0][0][:1]).layers
        return {layer.name: layer.weight_bits for layer in layers}

    @pytest.mark.parametrize("bits", [3, 6, 8])
    def test_a_width_is_tried_as_the_toolkit_quantizes_at_it(
        self, bits, float_net, batches
    ):
        base = self.toolkit.quantize(float_net, batches, self.options)
        example = batches[0][0][:1]
        host = self.toolkit.host(base.model, example, base.reference)
        floats = {layer.name: layer.weight for layer in host.layers}
        before = {k: v.clone() for k, v in base.model.state_dict().items()}
        with host.prepared():
            tried = host.quantize(floats, dict.fromkeys(floats, bits))
        assert_same_state(base.model, before)
        options = replace(self.options, layer_bits=dict.fromkeys(floats, bits))
        again = self.toolkit.quantize(float_net, batches, options)
        layers = self.toolkit.host(again.model, example, again.reference).layers
        assert {layer.weight_bits for layer in layers} == {bits}
        for layer in layers:
            torch.testing.assert_close(
                tried[layer.name], layer.dequantized, atol=1e-6, rtol=1e-5
            )

    def test_the_same_bits_and_nearer_to_float(self, float_net, batches, unseen):
        base = self.toolkit.quantize(float_net, batches, self.options)
        with torch.no_grad():
            reference = {"": float_net(unseen)}

        def distance(model):
            outputs = {"": self.toolkit.outputs(model, unseen)}
            return measure(KL(), reference, outputs).value

        adapted, report = self.toolkit.adapted(base, SAME_SIZE)
        stored = self.bits_a_weight(base, batches)
        assert report.equivalent_bits <= stored * (1 + 1e-9)
        assert adapted.model is not base.model
        assert distance(adapted.model) < distance(base.model) / 2

    def test_planned_widths_are_as_if_quantized_anew(self, float_net, batches, unseen):
        base = self.toolkit.quantize(float_net, batches, self.options)
        before = {k: v.clone() for k, v in base.model.state_dict().items()}
        plan = self.toolkit.plan(base, SAME_SIZE)
        assert plan.layer_bits
        planned = self.toolkit.quantize_planned(base, plan)
        assert_same_state(base.model, before)
        assert planned.options.layer_bits == plan.layer_bits
        anew = self.toolkit.quantize(float_net, batches, planned.options)
        expected = self.toolkit.outputs(anew.model, unseen)
        assert torch.equal(self.toolkit.outputs(planned.model, unseen), expected)

    @pytest.mark.parametrize("pinned", [None, {"dil*": 4}])
    def test_the_helper_plans_and_adapts_in_one_go(self, pinned, float_net, batches):
        base = self.toolkit.quantize(float_net, batches, self.options)
        before = self.widths(base.model, batches)
        stored = self.bits_a_weight(base, batches)
        report = self.applied(base.model, batches, SAME_SIZE, pinned=pinned)
        assert report.equivalent_bits <= stored * (1 + 1e-9)
        assert report.after.value < report.before.value
        after = {layer.name: layer.weight_bits for layer in report.layers}
        assert before != after
        if pinned:
            assert after["dilated"] == 4

    def test_widths_go_back_where_adapters_fail(self, float_net, batches, monkeypatch):
        model = self.toolkit.quantize(float_net, batches, self.options).model
        before = {k: v.clone() for k, v in model.state_dict().items()}
        bits = self.widths(model, batches)

        def fail(*_):
            raise RuntimeError("half-way")

        monkeypatch.setattr(CoRa, "apply", fail)
        with pytest.raises(RuntimeError, match="half-way"):
            self.applied(model, batches, SAME_SIZE)
        assert_same_state(model, before)
        assert self.widths(model, batches) == bits

    def test_an_iterator_is_refused_where_data_is_walked_twice(
        self, float_net, batches
    ):
        model = self.toolkit.quantize(float_net, batches, self.options).model
        with pytest.raises(CoRaError, match="walks it twice"):
            self.applied(model, iter(batches), SAME_SIZE)

    def test_a_width_that_is_none(self, float_net, batches):
        base = self.toolkit.quantize(float_net, batches, self.options)
        host = self.toolkit.host(base.model, batches[0][0][:1], base.reference)
        before = {k: v.clone() for k, v in base.model.state_dict().items()}
        layer = host.layers[0]
        with pytest.raises(CoRaError, match=layer.name):
            host.quantize({layer.name: layer.weight}, {layer.name: self.refused})
        assert_same_state(base.model, before)


class Expands:
    """Series terms beside every layer, without data; a subclass names the toolkit."""

    toolkit = None
    options = None

    def expanded(self, model, batches, config):
        """Call the toolkit's `expand_weights`."""
        raise NotImplementedError

    def test_terms_bring_the_model_nearer_without_data(
        self, float_net, batches, unseen
    ):
        with torch.no_grad():
            reference = {"": float_net(unseen)}
        found = []
        for terms in (1, 2):
            made = self.toolkit.quantize(float_net, batches, self.options)
            before = measure(
                KL(), reference, {"": self.toolkit.outputs(made.model, unseen)}
            )
            config = {"search": "series", "terms": terms, "adapter_bits": 3}
            report = self.expanded(made.model, batches, config)
            after = measure(
                KL(), reference, {"": self.toolkit.outputs(made.model, unseen)}
            )
            assert after.value < before.value
            found.append(max(error for _, error in report.errors.values()))
        assert found[1] < found[0] / 4
