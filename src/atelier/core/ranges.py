"""Argument types with ranges: written once, as annotations of constructors, and checked on the composed config."""

from typing import Annotated

from annotated_types import Ge, Gt, Interval, Len, MinLen, MultipleOf

PositiveInt = Annotated[int, Gt(0)]
Seed = Annotated[int, Interval(ge=0, lt=2**32)]
Port = Annotated[int, Interval(ge=1, lt=2**16)]
NonNegInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegFloat = Annotated[float, Ge(0)]
Probability = Annotated[float, Interval(ge=0, le=1)]
Share = Annotated[float, Interval(gt=0, le=1)]
Name = Annotated[str, MinLen(1)]
Names = Annotated[list[Name], MinLen(1)]
Labels = NonNegInt | Name | Annotated[list[NonNegInt | Name], MinLen(1)]
Width = Annotated[int, Ge(4), MultipleOf(2)]
Tile = Annotated[int, Ge(4), MultipleOf(4)]
Levels = Annotated[list[PositiveInt], MinLen(1)]
Betas = Annotated[list[Annotated[float, Interval(ge=0, lt=1)]], Len(2, 2)]
Span = Annotated[list[NonNegFloat], Len(2, 2)]
