"""The text encoder of a CLIP as MLflow runs it: sentences in, their embeddings out.

MLflow stores this file with the model and executes it on loading (models from code). Training opens a registered CLIP
by its export folder instead (`infra.registry.resolve_model`).

In: a frame with column `text`. Out: a frame with column `embedding`, lists of the features of a unit vector.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class ClipModel(PythonModel):
    """Embeds sentences with the exported folder that the model was registered with."""

    def load_context(self, context: Any) -> None:
        """Open the export; weights are read here, once."""
        from genmodels.clip.objective import open_pair

        self.pair = open_pair(Path(context.artifacts["export"]))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """The embedding of each sentence."""
        return pd.DataFrame({"embedding": self.pair.embed_texts(list(model_input["text"])).double().tolist()})


set_model(ClipModel())
