"""Whether a drafter proposes as many tokens as it should."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from speculators_cli.core.drafts.trained_draft import read_draft
from speculators_cli.core.errors import SettingsError
from speculators_cli.core.evaluation.checks import check_num_draft_tokens
from tests.tiny_drafts import make_config, write_draft


def test_a_number_of_tokens_that_the_algorithm_cannot_draft_is_refused(tmp_path: Path) -> None:
    source = read_draft(str(write_draft(tmp_path / "draft", make_config())))
    drafter: Any = SimpleNamespace(num_draft_tokens=1)

    with pytest.raises(SettingsError, match="algorithm `eagle3` drafts 1") as caught:
        check_num_draft_tokens(drafter, 3, source)

    assert caught.value.hint == "Pass `--num-speculative-tokens 1`"
    check_num_draft_tokens(drafter, 1, source)
