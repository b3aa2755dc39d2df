"""EAGLE-3 (arXiv 2503.01840), as an entry of the table of algorithms."""

from collections.abc import Mapping
from typing import Any

from speculators_cli.core.algorithms.eagle3.config import SWITCHES, Eagle3Config
from speculators_cli.core.algorithms.eagle3.config_reader import is_eagle3, read_draft_config
from speculators_cli.core.algorithms.eagle3.contract import FORMATS
from speculators_cli.core.algorithms.eagle3.cost import Eagle3Cost
from speculators_cli.core.algorithms.eagle3.eagle_algorithm import EagleAlgorithm, choose_windows
from speculators_cli.core.algorithms.overrides import Overrides
from speculators_cli.settings.algorithms.eagle3 import Eagle3Settings


class Eagle3(EagleAlgorithm[Eagle3Config, Eagle3Settings]):
    """The draft reads aux hidden states, then its own: one token per step."""

    name = "eagle3"
    settings_class = Eagle3Settings
    cost = Eagle3Cost()
    title = "EAGLE-3"
    export_formats = FORMATS

    def recognises(self, content: Mapping[str, Any]) -> bool:
        """Whether the content of a config.json is of an EAGLE-3 draft, speculators or plain."""
        return is_eagle3(content)

    def read_config(
        self, content: Mapping[str, Any], overrides: Overrides, *, name: str
    ) -> Eagle3Config:
        """The config of a trained draft, from any tool."""
        return read_draft_config(content, overrides, name=name)

    def build_config(self, settings: Eagle3Settings, shape: Mapping[str, Any]) -> Eagle3Config:
        """The config of a fresh draft."""
        switches = {name: getattr(settings, name) for name in SWITCHES}
        windows = choose_windows(settings, num_layers=shape["num_layers"])
        return Eagle3Config(**shape, **switches, **windows, ttt_steps=settings.ttt_steps)
