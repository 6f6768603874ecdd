"""Train a decoder of unCLIP: images from the embeddings of a CLIP, and from captions.

python pipelines/train_decoder.py                             the demo preset
python pipelines/train_decoder.py my.yaml workers.count=4 run.steps=20000

`train_unclip.py` trains all stages, one after the other.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a Ray job runs from a copy that is not installed

from infra.errors import main_exit
from pipelines.training.command import run

if __name__ == "__main__":
    main_exit(lambda: run(__doc__ or "", "unclip_decoder_demo", "latent_diffusion"))
