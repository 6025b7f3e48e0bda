"""The adapter of one layer: a sum of terms, as they are stored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import TypeVar

from torch import Tensor

from cora_plugin.adapters.errors import CoRaError
from cora_plugin.adapters.fingerprint import Fingerprint
from cora_plugin.adapters.form import Cost, Form, Kind
from cora_plugin.adapters.quantized import QuantizedTensor

T = TypeVar("T")


@dataclass(frozen=True)
class Term:
    """One summand of an adapter: its form, and its stored tensors by name.

    Raises:
        CoRaError: The tensors are not those of the form.
    """

    form: Form
    tensors: Mapping[str, QuantizedTensor]

    def __post_init__(self) -> None:
        found = {name: tuple(t.values.shape) for name, t in self.tensors.items()}
        if found != self.form.shapes:
            raise CoRaError(
                f"a {self.form} term of a weight {list(self.form.weight_shape)} holds "
                f"{self.form.shapes}, not {found}"
            )

    def scaled(self, share: float) -> "Term":
        """The same term with its weight multiplied by `share`."""
        first = {"a": self.tensors["a"].scaled(share)}
        return replace(self, tensors={**self.tensors, **first})


@dataclass(frozen=True)
class Adapter:
    """The sum of terms that is added to one layer's output.

    `fingerprint` identifies the quantized weight that the adapter was made for; it is
    None until the adapter is put beside a layer. `rounding_shift` [m] is what outputs
    gain where the sum of both weights is rounded to 8 bits, as exports for int8 kernels
    do (`cora_plugin.fitting.bias.rounding_shift`); None where it is not known.

    Raises:
        CoRaError: It has no terms, they are for different layers, or the rounding shift
            has another length than the layer's outputs.
    """

    terms: tuple[Term, ...]
    fingerprint: Fingerprint | None = None
    rounding_shift: Tensor | None = None

    def __post_init__(self) -> None:
        layers = {(form.weight_shape, form.groups) for form in self.forms}
        if len(layers) != 1:
            raise CoRaError(
                "an adapter needs terms for one weight and number of groups, not for "
                f"{sorted(layers)}"
            )
        shift, outputs = self.rounding_shift, self.weight_shape[:1]
        if shift is not None and tuple(shift.shape) != outputs:
            raise CoRaError(
                f"the rounding shift of an adapter for {outputs[0]} outputs has shape "
                f"{list(shift.shape)}; pass one number an output"
            )

    @classmethod
    def of(
        cls,
        forms: Sequence[Form],
        values: Mapping[str, Tensor],
        fingerprint: Fingerprint | None = None,
        rounding_shift: Tensor | None = None,
    ) -> "Adapter":
        """Quantize values, named as in `tensors`, to an adapter of these forms."""
        terms = (Term(form, form.quantize(v)) for form, v in by_term(forms, values))
        return cls(tuple(terms), fingerprint, rounding_shift)

    def __str__(self) -> str:
        """Its terms in a few words, as in "low-rank 4 + whole 2 bits"."""
        return " + ".join(map(str, self.forms))

    @property
    def forms(self) -> tuple[Form, ...]:
        """The forms of its terms."""
        return tuple(term.form for term in self.terms)

    @property
    def kind(self) -> Kind:
        """The kind of the first term."""
        return self.terms[0].form.kind

    @property
    def kinds(self) -> str:
        """The kinds of all terms, as in "low-rank + whole"."""
        return " + ".join(str(form.kind) for form in self.forms)

    @property
    def rank(self) -> int:
        """The rank of the first term."""
        return self.terms[0].form.rank

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the layer's weight."""
        return self.terms[0].form.weight_shape

    @property
    def groups(self) -> int:
        """The groups of the layer."""
        return self.terms[0].form.groups

    @property
    def tensors(self) -> dict[str, QuantizedTensor]:
        """The stored tensors of all terms: `a`, `b`, then `a1`, `b1`, and so on."""
        return {
            flat_name(name, index): tensor
            for index, term in enumerate(self.terms)
            for name, tensor in term.tensors.items()
        }

    @property
    def parameters(self) -> int:
        """Number of stored values and scales."""
        return self.cost().parameters

    @property
    def stored_bits(self) -> int:
        """Stored bits, scales counted."""
        return sum(t.stored_bits for t in self.tensors.values())

    def cost(self, outputs: int = 1, slides: int | None = None) -> Cost:
        """What it costs beside a layer: see `Form.cost`."""
        return reduce(add, (form.cost(outputs, slides) for form in self.forms))

    def merged(self) -> Tensor:
        """The weight that has the adapter's effect, [m, n/g, *kernel], float32."""
        return self.product({n: t.dequantize() for n, t in self.tensors.items()})

    def product(self, values: Mapping[str, Tensor]) -> Tensor:
        """`merged` with other values of its tensors."""
        parts = by_term(self.forms, values)
        return reduce(add, (form.merged(stored) for form, stored in parts))

    def scaled(self, share: float) -> "Adapter":
        """The same adapter with its weight multiplied by `share`.

        Another weight is rounded in another way, so it has no rounding shift.
        """
        terms = tuple(term.scaled(share) for term in self.terms)
        return replace(self, terms=terms, rounding_shift=None)


def flat_name(name: str, index: int) -> str:
    """The name of a term's tensor among those of all terms."""
    return f"{name}{index or ''}"


def by_term(
    forms: Sequence[Form], flat: Mapping[str, T]
) -> list[tuple[Form, dict[str, T]]]:
    """Group values that are named as in `Adapter.tensors` by term."""
    return [
        (form, {name: flat[flat_name(name, index)] for name in form.shapes})
        for index, form in enumerate(forms)
    ]
