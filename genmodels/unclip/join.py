"""Joining the stages of unCLIP, trained one by one, to one model: only stages that fit one another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genmodels.clip.frozen import FrozenClip
from genmodels.diffusion.layout import own_index, takes_prompts
from genmodels.unclip.layout import FACTS, INDEX, PartsDoNotFit, check_augmentation, check_same_clip

DRAWING: dict[str, Any] = {
    "priors": {},
    "decoder": {"num_steps": 20, "guidance_scale": 2.0, "sampler": "ddim"},
    "upsampler": {"num_steps": 10, "sampler": "ddim", "augmentation_level": 0.0, "augmentation": "non_truncated"},
}
"""How each stage draws, where nothing else is said. A prior's settings are those of its `draw_embeddings`.
`augmentation` of the first upsampler is non_truncated, where noise of `augmentation_level` is put on the decoder's
picture, or truncated, where the decoder ends as soon as its picture is no noisier (Ho et al. 2022, section 4)."""


def join(
    folder: Path,
    priors: Mapping[str, Path],
    decoder: Path,
    upsamplers: Mapping[str, Path],
    drawing: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write one model of the exports of its stages; returns its index.

    Args:
        folder: new; what `Unclip.from_folder` opens.
        priors: by name, the first is drawn with where none is named; none for a cascade that reads captions alone, as
            Imagen's (Saharia et al. 2022).
        decoder: a diffusion model that is told image embeddings, or that reads captions where there is no prior.
        upsamplers: by name, from small to large.
        drawing: what differs from DRAWING: "priors" by name, "decoder", and "upsamplers" by name.

    Raises:
        ValueError: a stage is missing or of another kind, or would be told noise that it never saw.
        PartsDoNotFit: stages belong to different CLIPs, or sizes do not follow one another; both values are named.
    """
    told = {"priors": {}, "decoder": {}, "upsamplers": {}, **(drawing or {})}
    kinds, clips = {}, {}
    for name, source in priors.items():
        if not (source / FACTS).is_file():
            raise ValueError(f"{name}: {source} is no prior (no {FACTS} there)")
        facts = json.loads((source / FACTS).read_text())
        kinds[name], clips[name] = facts["kind"], facts["clip"]
    own = _clip_of(decoder, clips)
    size = _check_sizes(decoder, upsamplers)
    of_upsamplers = {name: {**DRAWING["upsampler"], **told["upsamplers"].get(name, {})} for name in upsamplers}
    for number, (name, source) in enumerate(upsamplers.items()):
        trained = own_index(source)["image_condition"]["augmentation"]
        check_augmentation(name, number == 0, trained, of_upsamplers[name])
    content = {
        "priors": kinds,
        "upsamplers": list(upsamplers),
        "clip": own,
        "image_size": size,
        "drawing": {
            "priors": {name: dict(told["priors"].get(name, {})) for name in priors},
            "decoder": {**DRAWING["decoder"], **told["decoder"]},
            "upsamplers": list(of_upsamplers.values()),
        },
    }
    folder.mkdir(parents=True)
    if own is not None:
        shutil.copytree(decoder / "clip", folder / "clip")
    for name, source in priors.items():
        shutil.copytree(source / "prior", folder / name)
    shutil.copytree(decoder, folder / "decoder", ignore=_but_the_clip(decoder))
    for name, source in upsamplers.items():
        shutil.copytree(source, folder / name)
    (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n")
    return content


def _clip_of(decoder: Path, clips: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """What the decoder's CLIP says of itself, which is that of all priors; None of a cascade that has neither."""
    told = own_index(decoder).get("image_embedding")
    if told is None and clips:
        raise ValueError(f"decoder: {decoder} is told no image embeddings (train it with objective.image_embedding)")
    if told is not None and not clips:
        raise ValueError(f"decoder: {decoder} is told image embeddings, so it needs a prior, and none is given")
    if told is None:
        if not takes_prompts(decoder):
            raise ValueError(f"decoder: {decoder} reads no captions, and there is no prior that does")
        return None
    check_same_clip({**clips, "decoder": told["clip"]})
    own = FrozenClip.from_folder(decoder / "clip").describe()
    if own != told["clip"]:
        raise PartsDoNotFit(
            f"decoder: the CLIP in {decoder} has digest {own['digest']}, and {told['clip']['digest']} is meant"
        )
    return own


def _check_sizes(decoder: Path, upsamplers: Mapping[str, Path]) -> int:
    """The size of a picture. Raises where a stage does not begin where the one before it ends."""
    size = _pixels(decoder)
    before = "decoder"
    for name, source in upsamplers.items():
        told = own_index(source).get("image_condition") or {}
        if told.get("kind") != "low_resolution":
            raise ValueError(f"{name}: {source} is no upsampler (its image_condition is {told.get('kind', 'none')})")
        if (source / "vae").is_dir() or takes_prompts(source):
            raise ValueError(f"{name}: {source} is told captions or makes latents: an upsampler makes pixels of pixels")
        given = _pixels(source) // told["factor"]
        if given != size:
            raise PartsDoNotFit(
                f"{before} draws {size} pixels a side, and {name} takes {given}: train one of them anew"
            )
        size, before = _pixels(source), name
    return size


def _pixels(folder: Path) -> int:
    """Height and width of what a diffusion model draws."""
    for part in ("unet", "transformer"):
        if (folder / part / "config.json").is_file():
            size = int(json.loads((folder / part / "config.json").read_text())["sample_size"])
            vae = folder / "vae" / "config.json"
            factor = 1 if not vae.is_file() else 2 ** (len(json.loads(vae.read_text())["block_out_channels"]) - 1)
            return size * factor
    raise ValueError(f"{folder} is no diffusion model: there is no unet/ or transformer/config.json")


def _but_the_clip(decoder: Path) -> Any:
    return lambda folder, names: {"clip"} & set(names) if Path(folder) == decoder else set()
