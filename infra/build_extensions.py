"""Compile, ahead of the first run, what DeepSpeed would compile in it: the shared-memory operations of CPU training.

Takes about a minute, once; the result is kept in TORCH_EXTENSIONS_DIR. Needs a C++ compiler. On a machine with a GPU
there is nothing to build.
"""

import os
import sysconfig

import torch


def use_own_ninja() -> None:
    """Put this environment's ninja first on the path.

    There may be none beside it; and where there is one of another version, each takes what the other compiled for out
    of date, and a run that follows on a run would compile for a minute.
    """
    own, path = sysconfig.get_path("scripts"), os.environ.get("PATH", "")
    if path.split(os.pathsep)[0] != own:
        os.environ["PATH"] = os.pathsep.join(filter(None, [own, path]))


def main() -> None:
    if torch.cuda.is_available():
        return
    use_own_ninja()
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.comm.torch import build_shm_op

    build_shm_op()


if __name__ == "__main__":
    main()
