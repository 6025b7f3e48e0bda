"""What a recipe's run measured: a table on the screen, a folder of files."""

import io
import json
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import Subset

from cora_plugin.divergence import divergence
from cora_plugin.document import Document
from cora_plugin.recipe.images import Item
from cora_plugin.recipe.schema import Recipe
from cora_plugin.report import Report

PACKAGES = ("cora-plugin", "torch", "brevitas", "nncf", "timm", "torchvision", "onnx")


@dataclass(frozen=True)
class Row:
    """A model against the float one, and against the labels if there are any.

    `kl` is in nats; `bits` a quantized weight, scales and adapters included, where
    they were counted; `seconds` are those of this row's own steps.
    """

    model: str
    top1: float | None
    agreement: float
    kl: float
    bits: float | None
    seconds: float


class Results:
    """Everything that a run found out.

    Args:
        recipe: The recipe, with all that was decided for it.
        toolkit: The toolkit's title.
    """

    def __init__(self, recipe: Recipe, toolkit: str) -> None:
        self.recipe = recipe
        self.toolkit = toolkit
        self.rows: list[Row] = []
        self.report: Report | None = None
        self.notes: list[str] = []

    def begin(self, reference: Tensor, labels: Tensor, images: Subset[Item]) -> None:
        """Take the float model's outputs [N, classes, …] and the labels, -1 for none.

        Raises:
            CoRaError: The labels cannot be classes of these outputs.
        """
        self._reference = reference
        self._labels = labels if int(labels.min()) >= 0 else None
        self._check_labels(images.dataset, reference.shape[1])
        self.images = len(reference)
        self.add("float", reference, 0.0, bits=32.0)

    def add(
        self,
        name: str,
        outputs: Tensor,
        seconds: float,
        report: Report | None = None,
        bits: float | None = None,
    ) -> None:
        """Judge a model by its outputs [N, classes, …]."""
        if report is not None:
            self.report, bits = report, report.equivalent_bits
            last = self.rows[-1]
            before = asdict(last) | {"bits": report.equivalent_bits_before}
            self.rows[-1] = Row(**before)
        distance = divergence(self._reference, outputs)
        top1 = None
        if self._labels is not None:
            top1 = float((outputs.argmax(1) == self._labels).double().mean())
        self.rows.append(
            Row(name, top1, distance.agreement, distance.kl, bits, seconds)
        )

    def table(self) -> Table:
        """One row a model."""
        table = Table("model", title=f"{self.images} test images")
        headings = ["top-1"] if self._labels is not None else []
        headings += ["agreement", "KL to float", "bits/weight", "seconds"]
        for heading in headings:
            table.add_column(heading, justify="right")
        for row in self.rows:
            cells = [] if row.top1 is None else [f"{row.top1:.1%}"]
            cells += [f"{row.agreement:.1%}", f"{row.kl:.4g}"]
            cells += ["" if row.bits is None else f"{row.bits:.2f}"]
            cells += [f"{row.seconds:.0f}" if row.seconds else ""]
            table.add_row(row.model, *cells)
        return table

    def lines(self) -> list[str]:
        """Where everything is."""
        return [*self.notes, f"written to {self.recipe.output}"]

    def write(self, folder: Path) -> None:
        """Write the report, its table and picture, and the resolved recipe."""
        exports = [
            {**asdict(export), "bytes": _size(folder / export.path)}
            for export in self.recipe.exports
            if (folder / export.path).exists()
        ]
        whole = {
            "recipe": self.recipe.to_dict(),
            "rows": [asdict(row) for row in self.rows],
            "images": self.images,
            "exports": exports,
            "versions": _versions(),
            "cora": self.report.to_dict() if self.report else None,
        }
        (folder / "report.json").write_text(json.dumps(whole, indent=2, default=str))
        resolved = yaml.safe_dump(self.recipe.to_dict(), sort_keys=False)
        (folder / "recipe.yaml").write_text(resolved)
        text = io.StringIO()
        Console(file=text, width=108).print(self.table())
        if self.report is not None:
            text.write(f"\n{self.report}")
            try:
                self.report.plot(folder / "report.png")
            except ModuleNotFoundError as error:
                self.notes.append(f"no picture: {error}")
        (folder / "report.txt").write_text(text.getvalue())

    def _check_labels(self, source: Any, outputs: int) -> None:
        document: Document = self.recipe.document
        name = "test" if document.values.get("test") else "data"
        if source.classes not in (None, outputs):
            section = name if getattr(self.recipe, name).folder else "data"
            raise document.error(
                (section, "folder"),
                f"{section}.folder: it has {source.classes} classes and the model "
                f"{outputs} outputs; name the outputs in {section}.classes (a text "
                "file, a sub-folder's name a line), or use a glob, without labels",
            )
        if self._labels is not None and int(self._labels.max()) >= outputs:
            raise document.error(
                (name, "factory"),
                f"{name}.factory: label {int(self._labels.max())} is none of the "
                f"model's {outputs} outputs",
            )


def _size(path: Path) -> int:
    """Bytes of a file and of the weights that stand beside an OpenVINO IR."""
    weights = path.with_suffix(".bin") if path.suffix == ".xml" else path
    files = {path, weights}
    return sum(file.stat().st_size for file in files if file.exists())


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
