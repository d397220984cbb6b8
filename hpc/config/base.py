"""The base of every configuration class: frozen, no unknown keys, the docstring under a field is its help."""

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """A thing a user can name. Nothing changes it after it is loaded; what is derived lives in the plan."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)
