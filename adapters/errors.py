"""Errors that say what the caller can change; the subclass says what they are about."""

Key = tuple[str | int, ...]
"""Where a value stands in a mapping: `("exports", 0, "path")`."""


class CoRaError(ValueError):
    """Wrong input: the message names the layer or field, the value and the way out."""


class BudgetError(CoRaError):
    """A budget or target that cannot be met, or pinned ranks that cannot be had."""


class DataError(CoRaError):
    """Calibration or test data that cannot be used."""


class ModelError(CoRaError):
    """A model in the wrong state for a step, or one that cannot carry adapters."""


class ToolkitError(CoRaError):
    """A toolkit failed, or a part of it that runs a model; its own error is behind."""


class FileError(CoRaError):
    """A file that cannot be read or written, or that was made for something else."""


class ConfigError(CoRaError):
    """A setting that cannot be as it was given.

    Args:
        key: Leads to the setting: `("butterworth", "lr")`.
        problem: What is wrong with it, and what would be right.
        place: The line of a file or the flag it was written in; blank for what came as
            keyword arguments or in a mapping.
    """

    def __init__(self, key: Key, problem: str, place: str = "") -> None:
        super().__init__(key, problem, place)
        self.key = key
        self.problem = problem
        self.place = place

    @property
    def subject(self) -> Key:
        """What the message begins with."""
        return self.key

    def __str__(self) -> str:
        parts = (self.place, dotted(self.subject), self.problem)
        return ": ".join(part for part in parts if part)


class UnknownKeyError(ConfigError):
    """A key that nothing reads; the message begins with the mapping that it is in."""

    @property
    def subject(self) -> Key:
        """The mapping."""
        return self.key[:-1]


def dotted(key: Key) -> str:
    """A key as it is written: `exports.0.path`."""
    return ".".join(map(str, key))
