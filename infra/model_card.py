"""The model card: what a registered model is, what it learned from, how well it does, and how to open it.

It begins with the facts that a program can check, as YAML between two lines of ---, like the cards of model hubs; see
M. Mitchell et al., "Model cards for model reporting" (2019) for what the rest should tell.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

NOT_STATED = "not stated"
_FENCE = "---\n"
_NO_TAGS = ("license", "data_license", "figures")  # of the card alone; all else are tags of the version too
_OF_THE_RUN = {"seed": "run.seed"}  # facts that are parameters of the training's MLflow run
_TOLERANCE = 0.05  # between a held-out figure and what the run logged: steps done twice need not repeat to the bit

_INTENDED_USE = (
    "Research and prototypes on data like that which it was trained on. It repeats what its training data shows, "
    "mistakes and one-sidedness included; look at its pictures before others do."
)
_MISUSE = (
    "Pictures of real people who did not agree to them, or that show them saying or doing what they did not.",
    "Deceit: pictures passed off as photographs, documents or news. Say of each picture that a model made it; the PNG "
    "files say so themselves, as long as nobody takes it out.",
    "Evidence of anything. What a picture shows never happened, and a measurement on it measures nothing.",
    "Sexual pictures of anyone who did not agree, and of children ever; harassment, threats and incitement.",
    "Taking the place of the people whose work is in the training data, or going against that data's licence.",
)
_MISUSE_OF_READERS = (
    "Telling who somebody is, or watching people: it may not be what decides which pictures are of one person.",
    "Decisions about people, as on work, credit, health or punishment. It has learned the one-sidedness of its data.",
    "Anything that goes against the licence of the training data.",
)
_READERS = ("CLIP", "AutoencoderKL", "VQModel")  # layouts of models that draw nothing by themselves


def _table(header: tuple[str, str], rows: Mapping[str, Any]) -> list[str]:
    lines = [f"| {header[0]} | {header[1]} |", "| --- | --- |"]
    for key, value in rows.items():
        cells = [key, f"{value:.4g}" if isinstance(value, float) else str(value)]
        lines.append("| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in cells) + " |")
    return lines


def model_card(name: str, facts: Mapping[str, Any]) -> str:
    """Markdown from the facts of a training, without the facts for programs: see `with_front_matter`.

    Args:
        name: of the registered model.
        facts: `description`, `intended_use`, `license` (str); `captions` (examples, a list of str); `figures`
            (measured results), `data`, `training` and `lineage` (dicts of what to print); `layout` ("Stable
            Diffusion", "AutoencoderKL", …), `told_an_image` (whether it makes pictures of images). All optional; any
            other key is listed under "Further facts".
    """
    known = {"description", "intended_use", "license", "captions", "figures", "data", "training", "layout", "sampling"}
    known |= {"told_an_image", "lineage"}
    captions: Sequence[str] = facts.get("captions") or ()
    figures, data = dict(facts.get("figures") or {}), dict(facts.get("data") or {})
    if data and "bad_samples" in figures:
        data["samples that could not be used"] = f"{figures.pop('bad_samples'):g}"
    misuse = _MISUSE_OF_READERS if facts.get("layout") in _READERS else _MISUSE
    lines = [f"# {name}", "", str(facts.get("description") or "A generative model of images.")]
    lines += ["", "## Intended use", "", str(facts.get("intended_use") or _INTENDED_USE)]
    lines += ["", "## What it should not be used for", "", *(f"- {use}" for use in misuse)]
    if facts.get("license"):
        lines += ["", f"Licence of the weights: {facts['license']}"]
    for title, rows, header in (
        ("Training data", data, ("what", "value")),
        ("Training", facts.get("training"), ("setting", "value")),
        ("Figures", figures, ("figure", "value")),
        ("Lineage", facts.get("lineage"), ("what", "value")),
    ):
        if rows:
            lines += ["", f"## {title}", "", *_table(header, rows)]
    if captions:
        lines += ["", "Captions it was trained on, for example:", "", *(f"- {caption}" for caption in captions[:8])]
    further = {key: value for key, value in facts.items() if key not in known}
    if further:
        lines += ["", "## Further facts", "", *_table(("fact", "value"), further)]
    return "\n".join([*lines, "", "## How to open it", "", *_opening(name, facts)]) + "\n"


def with_front_matter(card: str, facts: Mapping[str, Any]) -> str:
    """The card, beginning with what can be checked: lineage, licences and figures. One that has such a beginning stays
    as it is."""
    if card.startswith(_FENCE):
        return card
    told = {
        **({"license": facts["license"]} if facts.get("license") else {}),
        "data_license": (facts.get("data") or {}).get("licence", NOT_STATED),
        **(facts.get("lineage") or {}),
        "figures": dict(facts.get("figures") or {}),
    }
    plain = json.loads(json.dumps(told, default=str))
    return f"{_FENCE}{yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)}{_FENCE}\n{card}"


def split_card(card: str) -> tuple[dict[str, Any], str]:
    """The facts that a card begins with, none where there are none, and the rest of it.

    Raises ValueError where the beginning cannot be read.
    """
    if not card.startswith(_FENCE):
        return {}, card
    beginning, fence, rest = card.removeprefix(_FENCE).partition(f"\n{_FENCE}")
    try:
        told = yaml.safe_load(beginning)
    except yaml.YAMLError:
        told = None
    if not fence or not isinstance(told, dict) or not isinstance(told.get("figures", {}), dict):
        raise ValueError("the facts that it begins with cannot be read")
    return told, rest.removeprefix("\n")


def contradiction(
    told: Mapping[str, Any], tags: Mapping[str, str], run_tags: Mapping[str, str], run_params: Mapping[str, str]
) -> str | None:
    """The first fact of a card that the version's tags or its run say otherwise, in words; None where all agree.

    Args:
        told: the facts that the card begins with.
        tags: of the version; the card must name those of the lineage, and a fact that is no tag is none.
        run_tags, run_params: of the MLflow run that trained it; what it does not hold is not compared.
    """
    for key in ("export_digest", "index_digest", "samples", "seed", "steps", "git_commit"):
        if key in tags and key not in told:
            return f"it does not tell {key}, and the version's tags do ({tags[key]})"
    for key, value in told.items():
        if key in _NO_TAGS:
            continue
        if str(value) != tags.get(key):
            return f"{key} is {value} there, and {tags.get(key, 'missing')} among the version's tags"
        by_run = run_params.get(_OF_THE_RUN[key]) if key in _OF_THE_RUN else None
        if key in ("index_digest", "other_index_digest"):
            by_run = run_tags.get(key)
        if by_run is not None and str(value) != by_run:
            return f"{key} is {value} there, and {by_run} in the run that trained it"
    return None


def differs(value: Any, logged: Sequence[float]) -> bool:
    """Whether a figure of a card is none that the run logged for that step; nothing logged contradicts nothing."""
    if not logged:
        return False
    number = isinstance(value, int | float)
    return not number or not any(math.isclose(value, each, rel_tol=_TOLERANCE, abs_tol=1e-6) for each in logged)


def _opening(name: str, facts: Mapping[str, Any]) -> list[str]:
    layout = str(facts.get("layout") or "")
    if layout in ("AutoencoderKL", "VQModel"):
        openers = [f"from diffusers import {layout}", f"autoencoder = {layout}.from_pretrained(folder)"]
        return ["`artifacts/` of this model is a diffusers folder:", "", "```python", *openers, "```"]
    if layout == "CLIP":
        return [
            "`artifacts/` of this model is a folder whose `text_encoder/` and `tokenizer/` open in transformers:",
            "",
            "```python",
            "from transformers import CLIPTextModel, CLIPTokenizer",
            'text_encoder = CLIPTextModel.from_pretrained(f"{folder}/text_encoder")',
            'tokenizer = CLIPTokenizer.from_pretrained(f"{folder}/tokenizer")',
            "```",
            "",
            f"Latent diffusion reads its captions with it: `objective.text_encoder.path=models:/{name}/VERSION`.",
        ]
    told_an_image = bool(facts.get("told_an_image"))
    frame = '{"image": [png_bytes]}' if told_an_image else '{"prompt": ["…"], "seed": [1]}'
    lines = [
        "```python",
        "import mlflow, pandas",
        f'model = mlflow.pyfunc.load_model("models:/{name}/VERSION")',
        f'pictures = model.predict(pandas.DataFrame({frame}))["png"]  # PNG files as bytes',
        "```",
        "",
        f"or `python pipelines/generate.py --model models:/{name}/VERSION "
        + ("--image FILE`." if told_an_image else "'a prompt'`."),
    ]
    if layout == "Stable Diffusion":
        lines += [
            "",
            "The folder under `artifacts/` has the Stable Diffusion layout:",
            "",
            "```python",
            "from diffusers import StableDiffusionPipeline",
            "pipeline = StableDiffusionPipeline.from_pretrained(folder)",
            "```",
        ]
    return lines
