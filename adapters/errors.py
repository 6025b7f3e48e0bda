"""Errors that say what the caller can change; a subclass tells what it is about."""


class CoRaError(ValueError):
    """Wrong input: the message names the layer or field, the value and the way out."""


class BudgetError(CoRaError):
    """A budget or target that cannot be met, or pinned ranks that exceed it."""


class DataError(CoRaError):
    """Calibration or test data that cannot be used."""


class ModelError(CoRaError):
    """A model that is not in the state that the step needs, or that cannot carry it."""


class FileError(CoRaError):
    """A file that is damaged, of another format, or made for something else."""
