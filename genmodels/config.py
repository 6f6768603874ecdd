"""The base of all configuration sections."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """A part of a configuration: a misspelt key is an error, and nothing changes after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def check_groups(channels: list[int], norm_groups: int) -> None:
    """Raise ValueError where the groups of a normalisation do not divide the features."""
    for count in channels:
        if count % norm_groups:
            raise ValueError(f"channels {count} is not a multiple of norm_groups {norm_groups}")


class Attention(Section):
    """A section whose attention heads divide the features of a token."""

    width: int
    heads: int

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Attention:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self
