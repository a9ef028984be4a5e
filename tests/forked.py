"""Runs scripts in processes forked from a server that has already imported torch, which saves seconds per process."""

import contextlib
import multiprocessing
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
import train  # noqa: E402


def run_script(script: str | Path | None, arguments: list[str], folder: Path, env: dict, files: list[Path]) -> None:
    """Run a script as `python script arguments` would, with standard input, output and error in files. Without a script
    it is train.py, which has been imported and need not be compiled again."""
    os.chdir(folder)
    os.environ.update(env)
    multiprocessing.current_process()._config["daemon"] = False  # since torchrun, as a script, starts processes
    for number, path in enumerate(files):
        os.dup2(os.open(path, os.O_CREAT | (os.O_WRONLY if number else os.O_RDONLY)), number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)
    timeit.repeat = lambda *_, **__: [0.01]  # with which train.py measures the speed of products, for half a second
    sys.argv = [str(script or train.__file__), *arguments]
    if script is None:
        train.main()
    else:
        sys.path.insert(0, os.path.dirname(script))
        runpy.run_path(str(script), run_name="__main__")
