"""The examples run and say what they claim, and the README shows what it says it shows."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import msgspec
import pytest

from streamattn.config import RunConfig

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
README = (ROOT / "README.md").read_text()
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]

# What an example prints once it has done its work; the real exit code and the last line are checked with it.
CLAIMS = {
    "01_embed.py": ([], r"(?m)^499 tensor\(\[0\.\d+, 0\.\d+, 0\.\d+\]\)$"),
    "02_zeromq.py": (["--steps", "300"], r"300 of 300 events answered, 0 missing"),
    "03_custom_model.py": (
        ["--steps", "20", "--events", "300"],
        r"300 events streamed: \d+% inside .*\nmedian after 2\.00: .*\nposition 301, ",
    ),
    "04_train_on_csv.py": (
        ["--epochs", "1"],
        r"made up .*in a temporary folder\n(.*\n)+  streaming engine  \d\.\d+ bits per event\n",
    ),
    "05_order_flow.py": (
        ["--branches", "20", "--steps", "12"],
        r"12 events of each branch in .* s; 100 live events answered since\n(.*\n)+ +12 ( +[+-]\d+){3} +\d\.\d\d",
    ),
}


def run_python(*arguments: str) -> str:
    """Return what a Python program prints; it must end well and must not warn."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


def blocks(text: str, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", CLAIMS)
def test_examples_do_what_they_claim(name: str) -> None:
    arguments, claim = CLAIMS[name]
    printed = run_python(f"examples/{name}", *arguments)
    assert re.search(claim, printed), printed


def test_every_numbered_example_is_run() -> None:
    assert {path.name for path in EXAMPLES if path.name[0].isdigit()} == set(CLAIMS)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_short_and_use_public_names_only(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= 80
    private = re.findall(r"^(?:from|import) .*\b_[a-z]\w*|\bstreamattn[\w.]*\._[a-z]\w*", source, re.MULTILINE)
    assert not [name for name in private if "__future__" not in name]


def test_a_tape_of_ones_own_is_trained_on_and_kept(tmp_path: Path) -> None:
    rows = ["time,price,volume"]
    for i in range(3000):
        time = f"2024-01-02T09:{i // 60 % 60:02d}:{i % 60:02d}.{i // 3600:03d}"
        rows.append(f"{time},{100 + (i % 4) / 4},1")
    tape = tmp_path / "mine.csv"
    tape.write_text("\n".join(rows) + "\n")
    out = tmp_path / "model"
    printed = run_python("examples/04_train_on_csv.py", "--tape", str(tape), "--epochs", "1", "--out", str(out))
    assert "made up" not in printed
    assert "scored 599 events, 2400 to 3000" in printed
    assert {path.name for path in out.iterdir()} == {"model.json", "model.safetensors"}


# --- README ----------------------------------------------------------------------------------------------------------


def test_the_twelve_lines_of_the_readme_are_the_first_example_and_run() -> None:
    marked = README.split("<!-- the body of examples/01_embed.py")[1]
    shown = blocks(marked, "python")[0]
    body = (ROOT / "examples/01_embed.py").read_text().split('"""', 2)[2]
    assert shown.strip() == body.strip()
    assert len([line for line in shown.splitlines() if line]) == 12
    assert len(run_python("-c", shown).splitlines()) == 500


def test_the_memory_command_of_the_readme_prints_what_stands_beside_it() -> None:
    command, wanted = re.findall(r"^python -c '([^']*)' +# (.*)$", README, re.MULTILINE)[0]
    assert run_python("-c", command).split() == wanted.split()


def test_the_configuration_of_the_readme_is_one() -> None:
    (text,) = blocks(README, "toml")
    config = msgspec.convert(tomllib.loads(text), RunConfig)
    assert config.source[0].url in README.split("```toml")[0], "both forms of the command say the same"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(((?!https?://|#)[^)#]+)(?:#[^)]*)?\)", path.read_text())
    assert not [target for target in targets if not (path.parent / target).exists()]
