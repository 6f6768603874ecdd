"""Train the KL autoencoder of latent diffusion.

python pipelines/train_autoencoder.py                          the demo preset
python pipelines/train_autoencoder.py my.yaml run.steps=20000  your own, with an override
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a Ray job runs from a copy that is not installed

from infra.errors import main_exit
from pipelines.training.command import run

if __name__ == "__main__":
    main_exit(lambda: run(__doc__ or "", "autoencoder_demo", "autoencoder"))
