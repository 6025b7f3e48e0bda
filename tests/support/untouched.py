"""What a refusal owes: the model is as it was."""

from contextlib import contextmanager

from cora_plugin.testing.checks import assert_same_state, state


@contextmanager
def untouched(model):
    """Check that a block leaves everything of a model that could have been changed.

    Beside its state: modules and their order, training mode, attributes, hooks, flags
    of Brevitas' layers, and which parameters they are, with their gradients.
    """
    before, modules, parameters = state(model), _modules(model), _parameters(model)
    yield
    after = _modules(model)
    for name, seen in modules.items():
        assert after.get(name) == seen, name
    assert list(after) == list(modules)
    assert _parameters(model) == parameters
    assert_same_state(model, before)


def _modules(model):
    return {
        name: (
            type(module),
            module.training,
            sorted(vars(module)),
            list(module._parameters),
            list(module._buffers),
            list(module._modules),
            len(module._forward_hooks) + len(module._forward_pre_hooks),
            getattr(module, "return_quant_tensor", None),
            getattr(module, "disable_quant", None),
        )
        for name, module in model.named_modules()
    }


def _parameters(model):
    return {
        name: (id(parameter), parameter.requires_grad, parameter.grad)
        for name, parameter in model.named_parameters()
    }
