"""Tests run side by side, a process a core. So torch gets one thread in each, and in all that they start: two
multi-threaded processes on the same cores are many times slower than two with a thread each."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import pytest


@pytest.fixture(scope="session")
def real_model(tmp_path_factory):
    """The folder of SmolLM2-135M: a real tokenizer and chat template."""
    from lab import smollm2
    from tools import UserError

    try:
        smollm2.find_gguf()
    except UserError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("models") / "smollm2-135m"
    smollm2.main(smollm2.SmolConfig(str(folder)))
    return str(folder)
