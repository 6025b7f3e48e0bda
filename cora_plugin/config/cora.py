"""The settings of CoRa: from keyword arguments, a mapping, YAML or a flag's text."""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from cora_plugin.adapters.errors import ConfigError, Key
from cora_plugin.config.budget import Budget
from cora_plugin.config.declared import Given, setting, settings
from cora_plugin.config.learning import ButterworthConfig, RefineConfig
from cora_plugin.config.objective import AUTO, checked, plain
from cora_plugin.config.old import as_written, renewed
from cora_plugin.document import Document, parse_value

Metric = Literal["svd", "lqer", "qera-approx", "qera-exact"]
Search = Literal["uniform", "spectral", "butterworth", "series"]
Correction = Literal["off", "own", "cascade"]

METRICS = get_args(Metric)
"""What `metric` may be."""

SEARCHES = get_args(Search)
"""What `search` may be."""

CORRECTIONS = get_args(Correction)
"""What `bias_correction` may be."""


def _complete(given: Given) -> Given:
    """Read old spellings; a metric that is named asks for its closed form alone."""
    given = renewed(given)
    if given.get("regression") is None:
        given.pop("regression", None)
        if "metric" in given or given.get("search") == "series":
            given["regression"] = False
    return given


def _correction(value: Any) -> Any:
    return "off" if value is False else value  # As YAML reads a bare `off`.


def _refinement(value: Any) -> Any:
    """A number is that of iterations."""
    if isinstance(value, int) and not isinstance(value, bool):
        return {"iterations": value}
    return value


def _amounts(value: Any) -> Any:
    """Amounts of a sequence, one alone, or text such as `0.02/0.05/0.1`."""
    if isinstance(value, str):
        return [parse_value(part.strip(), ("sweep",)) for part in value.split("/")]
    return [value] if isinstance(value, int | float) else value


def _bits_of(key: str) -> Callable[[Any], Any]:
    """Reads widths of a sequence, or `3/4/8` as text."""

    def read(value: Any) -> Any:
        if isinstance(value, str | int) and not isinstance(value, bool):
            value = [
                parse_value(each.strip(), (key,)) for each in str(value).split("/")
            ]
        if not isinstance(value, list | tuple):
            return value
        # What is no number is refused later, by its place.
        numbers = all(isinstance(each, int | float) for each in value)
        return tuple(sorted(set(value))) if numbers else value

    return read


def _widths(value: Any) -> Any:
    return None if value == "host" else _bits_of("menu")(value)


@settings(complete=_complete)
@dataclass(frozen=True)
class CoRaConfig:
    """The settings of CoRa: what adapters may cost, and how they are found.

    If you are not sure what to use, set the budget and leave the rest.

    Raises:
        ConfigError: A setting is unknown or its value impossible.
    """

    budget: Budget = setting(
        Budget(0.05),
        "what all adapters may cost: fraction of parameters, added `bits` a weight, or "
        "fraction of `macs`; all that is stored: `4.1 bits total`, `1.0 ptq` (times "
        "what plain PTQ stores), `0.8 MiB`; or what they must reach: `0.05 kl`, "
        "`0.001 mse`, `40 dB`, `95% agreement`",
        read=Budget.parse,
    )
    search: Search = setting(
        "spectral",
        "how ranks are chosen: `spectral`, where they remove most of the loss; "
        "`uniform`, the same fraction of the full rank everywhere; `butterworth`, "
        "learned by gradient as in CoRa's paper (minutes); `series`, no ranks but "
        "`terms` of each layer's own shape, whatever the budget",
    )
    metric: Metric = setting(
        "qera-exact",
        "the error that factors minimize: `svd`, `lqer`, `qera-approx`, `qera-exact`",
    )
    regression: bool = setting(
        True,
        "then solve adapters again by a regression of each layer's whole error, from "
        "upstream and from activations included; false where only a metric is named",
    )
    adapter_bits: int = setting(
        4,
        "bit width of the stored adapters, 2 to 8, or 32 for float; 4 buy most for "
        "their bits",
        among=(*range(2, 9), 32),
    )
    terms: int = setting(
        1, "terms of `adapter_bits` that `search=series` gives every layer", least=1
    )
    term_bits: tuple[int, ...] = setting(
        (2, 3),
        "further bit widths, 2 to 8, of terms of a layer's own shape that `spectral` "
        "may buy in place of factors, where bits are budgeted; `2/3` as flag text",
        read=_bits_of("term_bits"),
        least=2,
        greatest=8,
    )
    ranks: Mapping[str, int] = setting(
        {},
        "ranks pinned by layer name or glob, which need no budget where they are all "
        "layers'; 0 leaves a layer alone",
        least=0,
    )
    bias_correction: Correction = setting(
        "own",
        "`own`: correct the mean error that adapters leave in each layer; `cascade`: "
        "match mean outputs to the float network's, layer by layer; `off`. Skipped "
        "where the regression is kept, which corrects biases itself",
        read=_correction,
    )
    alternations: int = setting(
        0,
        "how often to solve main weight and adapter in turn; the best result is kept "
        "(Brevitas, not after GPTQ)",
        least=0,
    )
    refine: RefineConfig = setting(RefineConfig(), read=_refinement)
    sweep: tuple[float, ...] = setting(
        (),
        "further budgets to measure, in the unit of the budget (bits, if that is a "
        "target); `0.02/0.05/0.1` as flag text",
        read=_amounts,
        above=0,
    )
    damping: float = setting(
        1e-4,
        "added to each metric's diagonal, relative to its mean",
        least=0,
        below=1,
    )
    held_out: float = setting(
        0.2,
        "share of the calibration images that are only used to judge every step",
        above=0,
        below=1,
    )
    reserve_images: int = setting(
        64,
        "further images that judge steps which the held-out ones leave in doubt; they "
        "calibrate, but no step is fitted to them",
        least=0,
    )
    sensitivity_images: int = setting(
        64, "images of the backward pass of `spectral`", least=1
    )
    positions: int = setting(
        64,
        "how many output positions an image the statistics of a layer use at most, and "
        "never more than the length of its unfolded input; 0: all",
        least=0,
    )
    sequential_images: int = setting(
        64,
        "images that the regression and `cascade` run through both networks at once",
        least=1,
    )
    max_metric: int = setting(
        4608,
        "largest second moment that is kept whole; larger ones are kept in diagonal "
        "blocks of input channels",
        least=1,
    )
    seed: int = setting(
        0, "the same seed gives the same adapters", least=0, below=2**63
    )
    butterworth: ButterworthConfig = setting(ButterworthConfig())
    menu: tuple[int, ...] | None = setting(
        None,
        "bit widths that each layer's weight may be quantized at, chosen together with "
        "adapters in a total budget before the toolkit quantizes; `3/4/5/6/8` as flag "
        "text; none: those of the toolkit",
        read=_widths,
        least=2,
        greatest=8,
    )
    objective: Any = setting(
        AUTO,
        "what near to the float model means: `kl` of class logits, `bernoulli` of "
        "logits or probabilities of yes, `mse`, `cosine`, or a function of two "
        "outputs; by output as in `{boxes: mse, scores: kl}`; `auto`, decided by the "
        "outputs and told in the report",
        read=checked,
    )
    axis: int | None = setting(
        None, "the axis of the classes in an output [N, …]; none: decided by its shape"
    )
    held_out_images: int = setting(
        512, "how many images are held out at most, a sample of that share", least=1
    )

    def __post_init__(self) -> None:
        if self.search == "butterworth" and (self.sweep or self.budget.is_target):
            key = "sweep" if self.sweep else "budget"
            raise ConfigError(
                (key,),
                f"{self.sweep or self.budget} needs the search again and again, and "
                "butterworth learns for minutes; use search=spectral, or one budget of "
                "params, bits or macs",
            )

        if self.search == "series" and (
            self.sweep or self.widths or self.budget.is_target
        ):
            key = "sweep" if self.sweep else "menu" if self.widths else "budget"
            raise ConfigError(
                (key,),
                "search=series gives every layer as many terms as `terms` says, and "
                "chooses nothing; leave it out, or use search=spectral",
            )

        if self.widths:
            self.budget.check_total()

    @property
    def widths(self) -> tuple[int, ...]:
        """The menu; empty where the toolkit's widths stay."""
        return self.menu or ()

    @property
    def sampled_images(self) -> int:
        """Size of the sample of calibration images that later steps run again."""
        wanted = [0]
        if self.search == "spectral":
            wanted.append(self.sensitivity_images)
        if self.search == "butterworth":
            wanted.append(self.butterworth.images)
        if self.regression or self.bias_correction == "cascade":
            wanted.append(self.sequential_images)
        if self.refine.iterations:
            wanted.append(self.refine.images)
        return max(wanted)

    @classmethod
    def of(cls, value: Any = None) -> "CoRaConfig":
        """Read a config from any of its forms.

        Args:
            value: None or True (defaults), a `CoRaConfig`, a mapping, a number (the
                budget), the path of a YAML file, or flag text such as
                `"budget=0.05,search=spectral"`.

        Raises:
            ConfigError: A key is unknown or a value impossible.
            FileError: The file cannot be read.
        """
        return value if isinstance(value, cls) else cls.read(as_document(value))

    @classmethod
    def read(cls, document: Document, above: Key = ()) -> "CoRaConfig":
        """Read the mapping at a key of a document; errors say where its values stand.

        Raises:
            ConfigError: A key is unknown or a value impossible.
        """
        values = document.at(above)
        try:
            return cls(**values)
        except ConfigError as error:
            raise document.located(as_written(error, values), above) from error

    def to_dict(self) -> dict[str, Any]:
        """A mapping that `of` reads back."""
        return asdict(replace(self, objective=AUTO)) | {
            "budget": str(self.budget),
            "objective": plain(self.objective),
            "sweep": list(self.sweep),
        }


def as_document(value: Any = None) -> Document:
    """What `CoRaConfig.of` reads as a document, with the place of each setting.

    Raises:
        ConfigError: It is none of these.
        FileError: The file cannot be read.
    """
    if value is None or value is True:
        return Document()
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return Document(values=dict(value))
    if isinstance(value, Budget | int | float) and value is not False:
        return Document(values={"budget": value})
    if isinstance(value, os.PathLike):
        return Document.read(value)
    if isinstance(value, str):
        if value.endswith((".yaml", ".yml")):
            return Document.read(value)
        return Document.of_flags(value, alone="budget")
    raise ConfigError(
        ("cora",),
        f"{value!r} is not a configuration; pass a mapping, a budget, flag text such "
        "as 'budget=0.05,search=spectral' or the path of a YAML file",
    )
