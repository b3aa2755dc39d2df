"""The algorithms: one line each."""

from typing import Any

from speculators_cli.core.algorithms.algorithm import Algorithm
from speculators_cli.core.algorithms.dflash.algorithm import DFlash
from speculators_cli.core.algorithms.dspark.algorithm import DSpark
from speculators_cli.core.algorithms.eagle3.algorithm import Eagle3
from speculators_cli.core.algorithms.peagle.algorithm import PEagle

ALGORITHMS: dict[str, Algorithm[Any, Any]] = {
    algorithm.name: algorithm for algorithm in (Eagle3(), DFlash(), DSpark(), PEagle())
}
