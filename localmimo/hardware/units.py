"""Units: sizes as people write them. Knows no machine."""

import re

from localmimo.errors import BadRequest

_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_bytes(size: str | int | float) -> int:
    """Bytes of "22GiB", "96GB", "512MiB", "1e9" or a number. GB is 10^9, GiB 2^30, a bare G is GiB."""
    if isinstance(size, int | float):
        return int(size)
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([kmgt]?)(i?b)?\s*", size.lower())
    if match is None:
        raise BadRequest(f'"{size}" is not a size: write it like 22GiB, 96GB or 512MiB.')
    number, prefix, suffix = match.groups()
    return int(float(number) * (1000 if suffix == "b" else 1024) ** _UNITS[prefix])


def format_bytes(size: float) -> str:
    """A size for people: 13.4 GB, 912 MB, 3 kB (powers of ten)."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale * 0.9995:
            digits = 1 if size < 100 * scale else 0
            return f"{size / scale:.{digits}f} {unit}"
    return f"{size / 1e3:.0f} kB"
