"""Parameter groups of a quantized model, by what its parameters are."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cora_plugin.adapters.errors import ConfigError, ModelError
from cora_plugin.host import TrainableHost
from cora_plugin.qat.hosted import hosted
from cora_plugin.training import Group
from cora_plugin.typed import unknown

GROUPS = ("latents", "weight_scales", "activation_scales", "adapters", "rest")
"""The names of the groups; `rest` are biases, norms and all else."""


def param_groups(
    model: nn.Module | TrainableHost, **settings: Mapping[str, Any]
) -> list[Group]:
    """Make an optimizer's groups of a model's parameters.

    >>> groups = param_groups(model, latents={"lr": 0.1}, rest={"lr": 0.01})
    >>> optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)

    Each group has its `name`; empty ones are left out. Adapters want gradients from now
    on; leave their group out where they are not to be trained. Parameters that want
    none are frozen and left out, but for scales of weights, which the scheduler decides
    on, and for latent weights where none of them wants any.

    Args:
        model: The quantized model, or its host.
        settings: Options of a group by its name, such as `adapters={"lr": 1e-4}`.

    Raises:
        ConfigError: There is no group of a name.
        ModelError: No toolkit knows the model, or it was wrapped before its adapters
            wanted gradients.
    """
    for name in settings:
        if name not in GROUPS:
            raise ConfigError(("param_groups",), unknown("group", name, GROUPS))
    host = hosted(model)
    roles = host.roles
    by_name: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    for name, parameter in host.model.named_parameters():
        if not parameter.is_floating_point():
            continue
        role = roles.get(name, "rest")
        if role == "adapters" and not parameter.requires_grad:
            _refuse_wrapped(model, name)
            parameter.requires_grad_(True)
        if parameter.requires_grad or role in ("latents", "weight_scales"):
            by_name[role].append(parameter)
    wanted = [each for each in by_name["latents"] if each.requires_grad]
    by_name["latents"] = wanted or by_name["latents"]
    return [
        {"name": name, "params": parameters, **settings.get(name, {})}
        for name, parameters in by_name.items()
        if parameters
    ]


def _refuse_wrapped(model: Any, name: str) -> None:
    if isinstance(model, DistributedDataParallel):
        raise ModelError(
            f"{name}: wanted no gradients when DistributedDataParallel was made, which "
            "would train it apart in each process; call param_groups(model) first, and "
            "wrap the model then"
        )
