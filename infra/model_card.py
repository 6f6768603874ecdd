"""The model card: what a registered model is, what it learned from, how well it does, and how to open it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_INTENDED_USE = (
    "Research and prototypes on data like that which it was trained on. It repeats what its training data shows, "
    "mistakes and one-sidedness included; look at its pictures before others do."
)


def _table(header: tuple[str, str], rows: Mapping[str, Any]) -> list[str]:
    lines = [f"| {header[0]} | {header[1]} |", "| --- | --- |"]
    for key, value in rows.items():
        cells = [key, f"{value:.4g}" if isinstance(value, float) else str(value)]
        lines.append("| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in cells) + " |")
    return lines


def model_card(name: str, facts: Mapping[str, Any]) -> str:
    """Markdown from the facts of a training.

    Args:
        name: of the registered model.
        facts: `description`, `intended_use`, `license` (str); `captions` (examples, a list of str); `figures`
            (measured results), `data` and `training` (dicts of what to print); `layout` ("Stable Diffusion",
            "AutoencoderKL", …), `told_an_image` (whether it makes pictures of images). All optional; any other key is
            listed under "Further facts".
    """
    known = {"description", "intended_use", "license", "captions", "figures", "data", "training", "layout", "sampling"}
    known |= {"told_an_image"}
    captions: Sequence[str] = facts.get("captions") or ()
    lines = [f"# {name}", "", str(facts.get("description") or "A generative model of images.")]
    lines += ["", "## Intended use", "", str(facts.get("intended_use") or _INTENDED_USE)]
    if facts.get("license"):
        lines += ["", f"Licence of the weights: {facts['license']}"]
    for title, key, header in (
        ("Training data", "data", ("what", "value")),
        ("Training", "training", ("setting", "value")),
        ("Figures", "figures", ("figure", "value")),
    ):
        if facts.get(key):
            lines += ["", f"## {title}", "", *_table(header, facts[key])]
    if captions:
        lines += ["", "Captions it was trained on, for example:", "", *(f"- {caption}" for caption in captions[:8])]
    further = {key: value for key, value in facts.items() if key not in known}
    if further:
        lines += ["", "## Further facts", "", *_table(("fact", "value"), further)]
    return "\n".join([*lines, "", "## How to open it", "", *_opening(name, facts)]) + "\n"


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
