"""Several models trained on the same batches, each as if it were alone: the same data, seeds, timesteps and noise.

What differs between them is then their own doing. Start-up, reading and the frozen networks are paid for once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genmodels.families import SideBySideConfig, build_objective, objective_class
from genmodels.objective import Batch, Mean, Objective, Phase, PhaseLoss, Preview

_COLUMNS = 8  # of the preview, which has a row for each member


class SideBySide(Objective):
    """The networks and phases of all members, one after the other; a network's name is `MEMBER-NETWORK`.

    Metrics of a member are `MEMBER/METRIC`, and `loss` is the mean over all that theirs are means of. The export has a
    folder for each member.
    """

    def __init__(self, config: SideBySideConfig, members: dict[str, Objective]) -> None:
        self.config = config
        self.members = members
        known: list[Objective] = []
        for member in members.values():
            for other in known:
                member.share_frozen(other)
            known.append(member)
        self.networks: dict[str, nn.Module] = {
            _joined(name, network): module
            for name, member in members.items()
            for network, module in member.networks.items()
        }
        self.frozen: dict[str, nn.Module] = {
            _joined(name, network): module
            for name, member in members.items()
            for network, module in member.frozen.items()
        }
        self.trained = {
            _joined(name, network): patterns
            for name, member in members.items()
            for network, patterns in member.trained.items()
        }
        self.phases = [_phase_of(name, phase) for name, member in members.items() for phase in member.phases]

    @staticmethod
    def from_config(config: SideBySideConfig, inputs: Path | None = None) -> SideBySide:
        """Build every member; `inputs/MEMBER` holds what that one needs from elsewhere.

        Raises:
            ValueError: an input is missing or does not fit; the message names the member.
        """
        members = {}
        for name, member in config.members.items():
            try:
                members[name] = build_objective(member, None if inputs is None else inputs / name)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return SideBySide(config, members)

    @staticmethod
    def abstract_networks(config: SideBySideConfig) -> dict[str, nn.Module]:
        """The trained networks of all members on the meta device."""
        return {
            _joined(name, network): module
            for name, member in config.members.items()
            for network, module in objective_class(member.kind).abstract_networks(member).items()
        }

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Each member prepares batches of its own, which its phases are given; what `once` computes, they share."""
        for batch in batches:
            batch.setdefault("once", {})
        own = {name: [dict(batch) for batch in batches] for name in self.members}
        for name, member in self.members.items():
            member.prepare(own[name])
            for batch, prepared in zip(batches, own[name], strict=True):
                batch[_own(name)] = prepared

    def begin_validation(self) -> None:
        for member in self.members.values():
            member.begin_validation()

    def validate(self, batch: Batch) -> dict[str, Mean]:
        """Each member's figures."""
        found: dict[str, Mean] = {}
        for name, member in self.members.items():
            found |= _named(name, member.validate(batch), found.get("loss"))
        return found

    def preview(self, batch: Batch) -> Preview | None:
        """A row of pictures for each member that draws."""
        rows, titles = [], []
        for name, member in self.members.items():
            drawn = member.preview(batch)
            if drawn is not None:
                rows.append(drawn.images[:_COLUMNS])
                told = [*drawn.titles[:_COLUMNS], *[""] * _COLUMNS][: len(rows[-1])]
                titles += [f"{name} {title}".strip() for title in told]
        return Preview(torch.cat(rows), titles, min(_COLUMNS, *(len(row) for row in rows))) if rows else None

    def finish(self, batches: Iterable[Batch]) -> dict[str, float]:
        """What each member measures at the end, as `MEMBER/FIGURE`."""
        kept = list(batches)
        return {
            f"{name}/{key}": value
            for name, member in self.members.items()
            for key, value in member.finish(kept).items()
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Each member's own state, as `MEMBER/KEY`."""
        return {
            f"{name}/{key}": value
            for name, member in self.members.items()
            for key, value in member.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, member in self.members.items():
            start = f"{name}/"
            member.load_state_dict({k.removeprefix(start): v for k, v in state.items() if k.startswith(start)})

    def export(self, folder: Path) -> dict[str, Any]:
        """Each member's export in `folder/MEMBER`; returns their layouts, and the parameters of all networks."""
        layouts: dict[str, Any] = {}
        parameters: dict[str, int] = {}
        for name, member in self.members.items():
            (folder / name).mkdir()
            facts = member.export(folder / name)
            layouts[name] = facts["layout"]
            parameters |= {_joined(name, network): count for network, count in facts["parameters"].items()}
        return {"layout": layouts, "parameters": parameters}

    def load_weights(self, folder: Path) -> None:
        """Start from the export of members of the same names.

        Raises:
            ValueError: one is missing, or has other shapes; the message names it.
        """
        for name, member in self.members.items():
            try:
                member.load_weights(folder / name)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error

    def flops_per_sample(self) -> float | None:
        """Of all members; None where one does not know its own."""
        known = [member.flops_per_sample() for member in self.members.values()]
        return None if None in known else float(sum(known))  # type: ignore[arg-type]


def _of_all(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{name}/{key}": value for name, part in parts.items() for key, value in part.items()}


def _joined(member: str, network: str) -> str:
    return f"{member}-{network}"


def _own(name: str) -> str:
    """Where a batch has what a member prepared."""
    return f"of member {name}"


def _phase_of(name: str, phase: Phase) -> Phase:
    def loss(batch: Batch) -> PhaseLoss:
        result = phase.loss(batch.get(_own(name), batch))
        return PhaseLoss(result.loss, _named(name, result.metrics))

    return replace(phase, network=_joined(name, phase.network), loss=loss)


def _named(name: str, metrics: dict[str, Mean], loss: Mean | None = None) -> dict[str, Mean]:
    """A member's metrics under its name; and `loss`, where it has one, added to that of others."""
    named = {f"{name}/{key}": value for key, value in metrics.items()}
    if "loss" in metrics:
        own = metrics["loss"]
        named["loss"] = own if loss is None else Mean(loss.total + own.total, loss.count + own.count)
    return named
