"""A prior of unCLIP as MLflow runs it: sentences in, image embeddings of its CLIP out.

MLflow stores this file with the model and executes it on loading (models from code). Training and joining open a
registered prior by its export folder instead (`infra.registry.resolve_model`).

In: a frame with column `text` and, optionally, `seed` (0). Out: a frame with column `embedding`, lists of the features
of a unit vector. An embedding depends on its own row only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class PriorModel(PythonModel):
    """Draws image embeddings with the exported folder that the model was registered with."""

    def load_context(self, context: Any) -> None:
        """Open the export; weights are read here, once."""
        from genmodels.clip.frozen import FrozenClip
        from genmodels.unclip.pipeline import open_prior

        folder = Path(context.artifacts["export"])
        self.clip = FrozenClip.from_folder(folder / "clip")
        self.prior = open_prior(folder / "prior", json.loads((folder / "prior.json").read_text())["kind"])

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """The embedding of each sentence."""
        import torch

        from genmodels.unclip.pipeline import draw_embeddings
        from genmodels.unclip.prior import read_captions

        texts = [str(text) for text in model_input["text"]]
        seeds = [0] * len(texts)
        if "seed" in model_input:
            seeds = [0 if pd.isna(seed) else int(seed) for seed in model_input["seed"]]
        told = read_captions(self.clip, self.clip.tokens(texts))
        with torch.inference_mode():
            drawn = draw_embeddings(self.prior, told, {}, torch.tensor(seeds), {})
        return pd.DataFrame({"embedding": drawn.double().tolist()})


set_model(PriorModel())
