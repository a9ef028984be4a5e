"""Runs scripts in processes forked from a server that has already imported torch, which saves seconds per process."""

import contextlib
import os
import runpy
import sys
import timeit
from pathlib import Path

import torch
import torch._dynamo  # every optimizer imports it

# Tests compare bits, so they run on the CPU wherever they run: in this process, in those forked from it, and in those
# that are started. Only test_gpu.py uses the accelerator, with the environment as it was.
ACCELERATOR, ENVIRONMENT = torch.accelerator.current_accelerator(check_available=True), dict(os.environ)
torch.accelerator.current_accelerator, torch.cuda.is_available = lambda *_, **__: None, lambda: False
os.environ["CUDA_VISIBLE_DEVICES"] = ""

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

with contextlib.suppress(ImportError):
    import torch.utils.tensorboard

import plan  # noqa: E402, F401 - and with it everything that the scripts import


def run_script(script: Path, arguments: list[str], folder: Path, env: dict, files: list[Path]) -> None:
    """Run a script as `python script arguments` would, with standard input, output and error in files."""
    os.chdir(folder)
    os.environ.update(env)
    for number, (path, mode) in enumerate(
        zip(files, (os.O_RDONLY, os.O_WRONLY | os.O_CREAT, os.O_WRONLY | os.O_CREAT))
    ):
        os.dup2(os.open(path, mode), number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)
    torch.set_num_threads(1)
    timeit.repeat = lambda *_, **__: [0.01]  # with which train.py measures the speed of products, for half a second
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
