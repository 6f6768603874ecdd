"""The base of all configuration sections."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of a configuration: a misspelt key is an error, and nothing changes after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True)
