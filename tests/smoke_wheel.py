"""Run by CI with the installed wheel, far from the checkout: the shipped model answers, and the files are all there."""

import os
import subprocess
import sys
from pathlib import Path

sys.path.append(os.environ["SMOKE_SITE"])  # third-party packages; what is installed here comes first

import numpy as np

import streamattn

home = Path(streamattn.__file__).parent
assert Path(sys.prefix) in home.parents, f"expected the wheel's own files, found {home}"
assert not (home / "kernels").is_symlink()

checkpoint = streamattn.load_checkpoint(streamattn.shipped_model("emini"))
engine = streamattn.Engine(checkpoint.model, lanes=1)
stream = engine.open("smoke")
width = len(checkpoint.schema.features)
stream.push([1] * 199, np.zeros((199, width), np.float32))
result = stream.push([1], np.zeros(width, np.float32))
assert result.sequence == 199
assert result.heads["next"].shape == (1, 3)

environment = {**os.environ, "PYTHONPATH": os.environ["SMOKE_SITE"]}
shown = subprocess.run(
    [sys.executable, "-m", "streamattn", "env"], check=True, capture_output=True, text=True, env=environment
)
assert streamattn.__version__ in shown.stdout
print("wheel: ok")
