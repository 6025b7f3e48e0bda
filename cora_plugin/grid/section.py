"""The `compare` section of a recipe: what is compared."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cora_plugin.adapters.errors import ConfigError
from cora_plugin.compare.experiment import RAISED
from cora_plugin.compare.rows import METHODS, NONE, PLANNED, SHORT
from cora_plugin.config import Budget
from cora_plugin.config.declared import read, setting, settings
from cora_plugin.document import Document
from cora_plugin.integrations.latency import Runtime
from cora_plugin.integrations.toolkit import toolkits
from cora_plugin.typed import unknown

SINGLE = ("ptq", "exports", "minutes", "gib", "latency", "ray")
"""Keys that are no lists."""

CORRECTED = "bias correction"
"""The method without adapters that corrects biases as the toolkit does."""

WIDER: Mapping[str, tuple[int, bool]] = {
    CORRECTED: (0, True),
    "one up": (1, True),
    "two up": (2, True),
    "one up uncorrected": (1, False),
    "two up uncorrected": (2, False),
}
"""Methods without adapters: how many more bits a weight has, and whether biases are
corrected as the toolkit does, which does not serve every network."""


def _listed(value: Any) -> Any:
    """A list, or one value alone; what is named twice counts once."""
    if not isinstance(value, list | tuple):
        value = [value]
    # By their words, as 1 and true are equal.
    return list({repr(each): each for each in value}.values())


@settings("compare", "ray")
@dataclass(frozen=True)
class RayConfig:
    """What a cell takes of a Ray cluster; its memory is `gib` of the section."""

    cpus: float = setting(1.0, "CPUs a cell", above=0)
    gpus: float = setting(0.0, "GPUs a cell; 0.5 lets two share one", least=0)
    retries: int = setting(
        2, "how often a cell whose worker was lost is measured again", least=0
    )


@settings("compare")
@dataclass(frozen=True)
class CompareSection:
    """Lists of which every combination is a cell; each may be one value alone."""

    toolkits: tuple[str, ...] = setting(
        (), "toolkits; the recipe's own by default", read=_listed
    )
    recipes: tuple[str, ...] = setting(
        ("ptq",), "ways to quantize, of `Toolkit.recipes`", read=_listed
    )
    weight_bits: tuple[int, ...] = setting(
        (4,), "bit widths of weights", read=_listed, least=2, greatest=8
    )
    act_bits: tuple[int, ...] = setting(
        (8,), "bit widths of activations", read=_listed, least=2, greatest=8
    )
    methods: tuple[str, ...] = setting(
        (NONE, "default"),
        f"`{'`, `'.join((NONE, *WIDER, RAISED))}`, or those of "
        "`cora_plugin.compare.rows`",
        read=_listed,
    )
    budgets: tuple[float | str, ...] = setting(
        (0.05,), "what adapters may cost, as `cora.budget`", read=_listed
    )
    seeds: tuple[int, ...] = setting(
        (0,), "seeds that draw the images, as `data.seed`", read=_listed, least=0
    )
    ptq: Mapping[str, dict[str, Any]] = setting(
        {}, "by toolkit, options over those of the recipe's `ptq`"
    )
    exports: Mapping[str, list[Any]] = setting(
        {}, "by toolkit, files to write in place of the recipe's `exports`"
    )
    minutes: float = setting(60.0, "time limit of a cell", above=0)
    gib: float | None = setting(
        None, "memory limit of a cell in GiB; none: no limit", above=0
    )
    latency: Runtime | None = setting(
        None, "runtime that takes the time of the first export"
    )
    ray: RayConfig = setting(RayConfig())

    @classmethod
    def read(cls, document: Document) -> "CompareSection":
        """Read a document's section.

        Raises:
            ConfigError: A key, a name or a value is wrong; the message says its line.
        """
        if "compare" not in document.values:
            raise document.error(
                ("compare",),
                "nothing to compare; list toolkits, methods or budgets there, such as "
                "compare: {methods: [none, default], budgets: [2%, 5%]}",
            )
        section = read(cls, document, ("compare",))
        names = {
            "toolkits": ("toolkit", toolkits()),
            "methods": ("method", [NONE, *WIDER, RAISED, *METHODS, *PLANNED, *SHORT]),
        }
        for name in cls.__dataclass_fields__:
            if name not in SINGLE and not getattr(section, name):
                if name in document.values["compare"]:
                    problem = "an empty list; name one, or leave it out"
                    raise document.error(("compare", name), problem)
        for name, (what, known) in names.items():
            _all_known(document, name, what, getattr(section, name), known)
        for name in ("ptq", "exports"):
            _all_known(document, name, "toolkit", getattr(section, name), toolkits())
        for budget in section.budgets:
            try:
                Budget.parse(budget)
            except ConfigError as error:
                raise document.error(("compare", "budgets"), error.problem) from error
        return section


def _all_known(
    document: Document,
    name: str,
    what: str,
    given: Iterable[str],
    known: Sequence[str],
) -> None:
    for each in given:
        if each not in known:
            raise document.error(("compare", name), unknown(what, each, known))
