"""What every section of a configuration is, and the kinds of numbers in them."""

from typing import Annotated

import pydantic
from pydantic import Field

Fraction = Annotated[float, Field(ge=0, lt=1)]
PositiveFloat = Annotated[float, Field(gt=0)]


class Section(pydantic.BaseModel):
    """Base of every section: frozen, strict, finite numbers only, unknown keys refused."""

    model_config = pydantic.ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)
