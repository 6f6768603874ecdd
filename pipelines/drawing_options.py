"""How pictures are drawn: the arguments that `generate.py` and `evaluate.py` share."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genmodels.diffusion.layout import image_condition
from genmodels.gan.layout import is_unpaired
from infra.errors import BadRequest
from infra.exports import is_gan, is_unclip

_OF_SAMPLERS = {"guidance_rescale": 0.0, "guidance_interval": (0.0, 1.0), "eta": 0.0}  # as they are where not given
_DEFAULTS = {"num_steps": 20, "guidance_scale": 2.0, "sampler": "ddim"}
SAMPLERS = ("ddpm", "ddim", "dpm_solver++", "euler", "heun", "euler_ancestral")


def add_drawing_arguments(parser: argparse.ArgumentParser, precision: str = "fp32") -> None:
    """Add sampler, steps, guidance, batch size and precision, which is `precision` where nothing is said."""
    add, own = parser.add_argument, "a joined unCLIP's own"
    add("--num-steps", type=int, help=f"denoiser steps for each picture (default: {own}, else 20)")
    add("--guidance-scale", type=float, help=f"1 is no guidance (default: {own}, else 2)")
    add(
        "--guidance-rescale",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="bring the deviation of guided predictions back, 0 to 1 (default: %(default)s)",
    )
    add(
        "--guidance-interval",
        type=float,
        nargs=2,
        default=[0.0, 1.0],
        metavar=("LOW", "HIGH"),
        help="guide only between these shares of the schedule, 0 is clean and 1 is noise (default: 0 1)",
    )
    add("--sampler", choices=SAMPLERS, help=f"heun makes two passes a step (default: {own}, else ddim)")
    add("--eta", type=float, default=0.0, help="of ddim: share of fresh noise, 0 to 1 (default: %(default)s)")
    add(
        "--truncation",
        type=float,
        metavar="SHARE",
        help="of GANs, which draw in one pass and take nothing of the above: below 1 there is less variety, and less "
        "that is unusual (default: 1)",
    )
    add(
        "--direction",
        choices=("ab", "ba"),
        help="of a CycleGAN: from its first set of images to the other, or back (ab)",
    )
    add("--batch-size", type=int, default=64, help="pictures drawn at once; it changes none (default: %(default)s)")
    add(
        "--precision",
        default=precision,
        choices=["fp32", "bf16", "auto"],
        help="of the U-Net; auto: bf16 where the device is fast at it (default: %(default)s)",
    )


def drawing_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What of the arguments `TextToImage.draw` takes, by its names; `complete_options` adds what was not given.

    Raises:
        BadRequest: a number is out of range.
    """
    for name in ("num_steps", "batch_size"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise BadRequest(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if arguments.truncation is not None and arguments.truncation < 0:
        raise BadRequest(f"--truncation must be 0 or more, not {arguments.truncation:g}")
    low, high = arguments.guidance_interval
    if not 0 <= low < high <= 1:
        raise BadRequest(f"--guidance-interval must be LOW < HIGH, both from 0 to 1, not {low:g} {high:g}")
    if not 0 <= arguments.guidance_rescale <= 1:
        raise BadRequest(f"--guidance-rescale must be from 0 to 1, not {arguments.guidance_rescale:g}")
    if not 0 <= arguments.eta <= 1 or (arguments.eta and arguments.sampler not in ("ddim", None)):
        raise BadRequest(f"--eta {arguments.eta:g}: only --sampler ddim takes one, from 0 to 1")
    given = {name: getattr(arguments, name) for name in (*_DEFAULTS, "truncation", "direction")}
    return {
        **{name: value for name, value in given.items() if value is not None},
        "guidance_rescale": arguments.guidance_rescale,
        "guidance_interval": (low, high),
        "eta": arguments.eta,
        "batch_size": arguments.batch_size,
    }


def complete_options(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """With the steps, guidance and sampler that the export in `folder` draws with where they are not among `options`.

    Raises:
        BadRequest: what is given is not of this kind of model.
    """
    if "direction" in options and (not is_gan(folder) or not is_unpaired(folder)):
        raise BadRequest("--direction is of CycleGANs, which have learnt both")
    if is_gan(folder):
        if told := [name for name in _DEFAULTS if name in options]:
            raise BadRequest(f"--{told[0].replace('_', '-')}: a GAN draws in one pass, without sampler and guidance")
        if told := [name for name, usual in _OF_SAMPLERS.items() if options.get(name, usual) != usual]:
            raise BadRequest(f"--{told[0].replace('_', '-')}: a GAN draws in one pass, without sampler and guidance")
        if "truncation" in options and image_condition(folder) is not None:
            raise BadRequest("--truncation is of GANs that draw from latents, and this one makes an image of another")
        return {name: value for name, value in options.items() if name not in _OF_SAMPLERS}
    if "truncation" in options:
        raise BadRequest("--truncation is of GANs; other models follow a prompt more closely by --guidance-scale")
    own = {}
    if is_unclip(folder):
        from genmodels.unclip.layout import read_index

        own = read_index(folder)["drawing"]["decoder"]
    whole = {**_DEFAULTS, **own, **options}
    if whole.get("eta") and whole["sampler"] != "ddim":
        raise BadRequest(f"--eta: this model draws with {whole['sampler']}, which takes none; add --sampler ddim")
    return whole
