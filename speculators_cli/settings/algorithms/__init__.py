"""The settings of each algorithm, by its name: a section of `train`; one line each."""

from speculators_cli.settings.algorithms.dflash import DFlashSettings
from speculators_cli.settings.algorithms.dspark import DSparkSettings
from speculators_cli.settings.algorithms.eagle3 import Eagle3Settings
from speculators_cli.settings.algorithms.peagle import PEagleSettings
from speculators_cli.settings.base import Settings

ALGORITHM_SETTINGS: dict[str, type[Settings]] = {
    "eagle3": Eagle3Settings,
    "dflash": DFlashSettings,
    "dspark": DSparkSettings,
    "peagle": PEagleSettings,
}
