"""Text from outside, shown as it is: rich would read `[…]` in it as markup."""

from rich.text import Text


def plain(text: str) -> Text:
    """A cell or a line of exactly this text, wrapped where it is too long, not cut."""
    return Text(text, overflow="fold")
