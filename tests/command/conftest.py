"""A model in a file."""

import pytest
from command.models import torch_like

from jaxweights import files


@pytest.fixture
def model(tmp_path):
    files.save(tmp_path / "model.safetensors", torch_like(), metadata={"format": "pt"})
    return tmp_path / "model.safetensors"
