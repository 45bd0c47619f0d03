import os

import openai
import pytest
from tests.serve.tiny import make_folder, serving

from hanlin.engine import Engine


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def engine(folder):
    engine = Engine.from_folder(folder, max_batch=4)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def address(engine):
    with serving({"tiny": engine}) as address:
        yield address


@pytest.fixture
def client(address):
    os.environ.pop("OPENAI_BASE_URL", None)
    with openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client
