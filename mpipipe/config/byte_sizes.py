"""Sizes in bytes as people write them: `6GiB`, `200 MiB`, `1.5 GiB`, `16GB`, `4096`."""

from __future__ import annotations

import re
from fractions import Fraction

__all__ = ["parse_bytes"]

_UNITS = {"": 1, "b": 1} | {
    name: factor
    for power, letter in enumerate("kmgt", 1)
    for name, factor in ((f"{letter}ib", 1024**power), (f"{letter}b", 1000**power))
}
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,9})?)\s*([A-Za-z]*)", re.ASCII)


def parse_bytes(text: str) -> int:
    """Whole bytes; a part of a byte is dropped. Upper and lower case mean the same.

    Raises:
        ValueError: it is no size; the text goes after "name = value".
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError('does not fit: expected a size such as "6GiB", "200 MiB" or "16GB"')
    number, unit = found[1], found[2]
    factor = _UNITS.get(unit.lower())
    if factor is None:
        likely = f"{unit[0].upper()}iB" if unit[0].lower() in "kmgt" else "GiB"
        raise ValueError(
            f'has the unit "{unit:.20}", which is not known: write KiB, MiB, GiB or TiB (powers of '
            f'1024), KB, MB, GB or TB (powers of 1000), or B, e.g. "{number}{likely}"'
        )
    return int(Fraction(number) * factor)
