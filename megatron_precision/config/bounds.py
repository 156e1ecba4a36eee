"""The values that a setting may have, written at its field in `schema.py` as `Annotated[...]`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Bounds:
    """The allowed values of a number.

    Attributes:
        words: the bounds in a user's words, for an error's "expected".
        least, most: inclusive bounds.
        above, below: exclusive bounds.
        or_zero: 0 is allowed besides, and switches the setting off.
    """

    words: str
    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    or_zero: bool = False

    def allow(self, value: float) -> bool:
        """Say whether a value is within the bounds."""
        if self.or_zero and value == 0:
            return True
        return self.least <= value <= self.most and self.above < value < self.below


# A token on which engine and trainer agree has the weight 1, and must keep it.
_AGREEMENT = "so that a token on which engine and trainer agree keeps its weight of 1"

Size = Annotated[int, Bounds("1 or more", least=1)]
Count = Annotated[int, Bounds("0 or more", least=0)]
Amount = Annotated[float, Bounds("0 or more", least=0)]
Positive = Annotated[float, Bounds("more than 0", above=0)]
Share = Annotated[float, Bounds("between 0 and 1", least=0, most=1)]
PositiveShare = Annotated[float, Bounds("more than 0, at most 1", above=0, most=1)]
Decay = Annotated[float, Bounds("in [0, 1)", least=0, below=1)]
ClipLow = Annotated[float, Bounds("more than 0, less than 1", above=0, below=1)]
FactorOrOff = Annotated[float, Bounds("0 (off) or more than 1", above=1, or_zero=True)]
WeightLimit = Annotated[float, Bounds(f"1 or more, {_AGREEMENT}", least=1)]
WeightFloor = Annotated[float, Bounds(f"more than 0, at most 1, {_AGREEMENT}", above=0, most=1)]
