"""The settings of each algorithm, by its name: a section of `train`; one line each."""

from speculators_cli.settings.algorithms.dflash import DFlashSettings
from speculators_cli.settings.algorithms.dspark import DSparkSettings
from speculators_cli.settings.algorithms.eagle3 import Eagle3Settings
from speculators_cli.settings.algorithms.peagle import PEagleSettings
from speculators_cli.settings.base import Settings, changed_flags, join_choices

ALGORITHM_SETTINGS: dict[str, type[Settings]] = {
    "eagle3": Eagle3Settings,
    "dflash": DFlashSettings,
    "dspark": DSparkSettings,
    "peagle": PEagleSettings,
}


def refuse_other_algorithms(settings: Settings, algorithm: str) -> None:
    """Refuse values that an algorithm does not read; defaults, as in a run's settings, are none.

    Args:
        settings: With a section per algorithm.
        algorithm: The one that is used.

    Raises:
        ValueError: There are some.
    """
    own = ALGORITHM_SETTINGS[algorithm].model_fields.keys()
    readers: dict[str, list[str]] = {}
    for name, section_class in ALGORITHM_SETTINGS.items():
        others = section_class.model_fields.keys() - own
        for flag in changed_flags(getattr(settings, name), others):
            readers.setdefault(flag, []).append(name)
    if readers:
        lines = [
            f"`{flag}` is a setting of {join_choices(names)}, not of `{algorithm}`"
            for flag, names in sorted(readers.items())
        ]
        raise ValueError("; ".join(lines))
