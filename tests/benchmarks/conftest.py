import pytest
from tiny_model import save_tiny_model


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory):
    """Folder of a tiny random Llama with a tokenizer of bytes and a chat template."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
