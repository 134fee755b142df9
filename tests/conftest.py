"""Fixtures that find reference data and models; tests skip with a reason where they are missing."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the project."""
    folder = Path(os.environ.get("FEDJAX_LLM_SHARED", ROOT.parent / "shared")).resolve()
    if not folder.is_dir():
        pytest.skip("needs the reference data in ../shared (or FEDJAX_LLM_SHARED)")
    return folder


@pytest.fixture(scope="session")
def stories260k(shared: Path) -> Path:
    """The smallest real model: five layers, 64 wide, vocabulary 512."""
    return shared / "models" / "stories260K"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, from the cache; never fetched by a test."""
    from fedjax_llm.models.hub import cached

    folder = cached("smollm2-135m")
    if folder is None:
        pytest.skip("needs SmolLM2 in the cache; run `fedjax-llm models get smollm2-135m`")
    return folder
