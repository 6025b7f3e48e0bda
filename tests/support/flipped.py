"""One bit of a file turned over."""

from random import Random


def flipped(content: bytes, random: Random) -> bytes:
    """The same bytes but for one bit, drawn at random."""
    bit = random.randrange(8 * len(content))
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)
