"""The package as a whole: its public names, its files in a wheel, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import streamattn

ROOT = Path(__file__).parent.parent


def test_public_names_exist() -> None:
    for name in streamattn.__all__:
        assert getattr(streamattn, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = streamattn.nothing


def test_every_package_folder_is_listed_for_the_wheel() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {"streamattn": ROOT / "streamattn", "streamattn.kernels": ROOT / "kernels"}
    folders["streamattn.connectors"] = ROOT / "connectors"
    assert set(setup["packages"]) == set(folders)
    for name, folder in folders.items():
        assert setup["package-dir"][name] == str(folder.relative_to(ROOT))
        nested = [p for p in folder.rglob("__init__.py") if p.parent != folder and not p.parent.is_symlink()]
        assert not [p for p in nested if "kernels" not in p.parts and "connectors" not in p.parts], "a folder is nested"
    for link in ("kernels", "connectors"):
        assert (ROOT / "streamattn" / link).readlink() == Path("..") / link


@pytest.mark.parametrize(
    "statement",
    [
        "import streamattn",
        "import streamattn.frame, streamattn.scheduler, streamattn.metrics, streamattn.config, streamattn.cli",
        "import streamattn.connectors, streamattn.connectors.zeromq, streamattn.tape, streamattn.ngram",
    ],
)
def test_what_needs_no_model_does_not_import_torch(statement: str) -> None:
    check = f"{statement}; import sys; assert 'torch' not in sys.modules and 'kernels' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT)
