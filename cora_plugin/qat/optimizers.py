"""The optimizer of `finetune`, by its settings."""

import torch

from cora_plugin.config import QATConfig
from cora_plugin.host import TrainableHost
from cora_plugin.qat.groups import param_groups
from cora_plugin.training import Group


def groups_of(host: TrainableHost, config: QATConfig) -> list[Group]:
    """The optimizer's groups; without adapters, unless they are trained along."""
    rest = {"lr": config.rest_lr, "weight_decay": 0.0}
    adapters = {**rest, "lr": config.adapter_lr or config.rest_lr}
    groups = param_groups(
        host,
        latents={"lr": config.first_lr, "weight_decay": config.weight_decay},
        weight_scales=rest,
        activation_scales=rest,
        adapters=adapters,
        rest=rest,
    )
    if config.adapters == "train":
        return groups
    for group in groups:
        if group["name"] == "adapters":
            for parameter in group["params"]:
                parameter.requires_grad_(False)
    return [group for group in groups if group["name"] != "adapters"]


def optimizer_of(config: QATConfig, groups: list[Group]) -> torch.optim.Optimizer:
    """The optimizer that the settings name."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, config.first_lr, momentum=config.momentum)
    kinds: dict[str, type[torch.optim.Optimizer]] = {
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "nadam": torch.optim.NAdam,
    }
    return kinds[config.optimizer](groups, lr=config.first_lr)  # type: ignore[call-arg]
