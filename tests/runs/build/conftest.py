"""A tokenizer for what is built without a model."""

import pytest

from fedjax_llm.models.tokenizer import Tokenizer, build_tokenizer
from tests.small_tokenizer import CHATML, SPECIAL, trained_json


@pytest.fixture(scope="session")
def chat_tokenizer() -> Tokenizer:
    return build_tokenizer(trained_json(), SPECIAL, CHATML)
