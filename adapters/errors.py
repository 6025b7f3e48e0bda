"""The one kind of error that says what the caller can change."""


class CoRaError(ValueError):
    """Wrong input: the message names the layer or field, the value and the way out."""
