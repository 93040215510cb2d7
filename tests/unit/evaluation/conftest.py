"""A tiny export for the evaluation's tests."""

import pytest

from tests.helpers import tiny_models


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory):
    """A cm3leon export with both tokenizers."""
    return tiny_models.save_export(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="session")
def generator(hf_folder):
    """The export, loaded."""
    from megacm3.inference.api import Generator

    return Generator.load(hf_folder)
