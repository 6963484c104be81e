"""What `make dist` builds runs the demo in an environment of its own, from an empty folder, without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import trimtab

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel built from it: DIST, or a new one."""
    if "DIST" in os.environ:
        return Path(os.environ["DIST"])
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], check=True)
    return folder


def environment(folder: Path) -> Path:
    """The Python of a new environment that finds what trimtab depends on where it is, and nothing of the checkout.

    A line of a .pth file adds a folder to the path, but not what .pth files in that folder add, such as an editable
    install.
    """
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin/python"
    site = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    (Path(site.strip()) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_the_demo_runs_without_the_checkout(kind: str, built: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "environment")
    (file,) = built.glob(kind)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run([python, "-m", "pip", "install", *options, file], check=True)
    (folder := tmp_path / "empty").mkdir()
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}

    def run(*words: str) -> str:
        command = [python.parent / words[0], *words[1:]]
        done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = Path(run("python", "-c", "import trimtab; print(trimtab.__file__)").strip())
    assert where.is_relative_to(tmp_path / "environment") and (where.parent / "py.typed").exists()
    assert trimtab.__version__ in run("trimtab", "--version")
    run("trimtab", "train", "words")
    answers = run("trimtab", "generate", "cat", "-a", "runs/words")
    assert all(word in answers for word in ("chat", "animal", "cats")), answers
