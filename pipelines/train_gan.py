"""Train a GAN: generator and discriminator, each with its own optimizer and ZeRO stage.

python pipelines/train_gan.py                                 the demo preset: digits from sentences
python pipelines/train_gan.py my.yaml objective.loss=hinge    your own, with an override
python pipelines/train_gan.py attn_gan_demo                   words at each place; trains damsm_demo first
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a Ray job runs from a copy that is not installed

from infra.errors import main_exit
from pipelines.training.command import run

if __name__ == "__main__":
    main_exit(lambda: run(__doc__ or "", "gan_demo", "gan", "pix2pix", "cycle_gan", "damsm", "attn_gan"))
