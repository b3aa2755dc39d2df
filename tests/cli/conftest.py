"""Samples of a real verifier: the embedded one."""

from pathlib import Path

import pytest

from speculators_cli.core.data.data_config import write_data_config
from speculators_cli.core.demo.demo import read_prompts
from tests.generated_samples import generate_samples
from tests.spread_verifier import write_spread_verifier


@pytest.fixture(scope="session")
def captured_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of a real verifier, whose head predicts them."""
    folder = tmp_path_factory.mktemp("captured")
    generate_samples(
        folder, read_prompts()[:6], max_new_tokens=24, storage={"all_last_states": True}
    )
    write_data_config(folder, verifier="the-verifier", layer_ids=(2, 4, 5))
    return folder


@pytest.fixture(scope="session")
def verifier_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same verifier with its final norm's gain spread out, and the head made up for it.

    The embedded one's gains are so even that the norm hardly changes which token comes first.
    """
    return write_spread_verifier(tmp_path_factory.mktemp("verifier"))
