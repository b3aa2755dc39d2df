"""PEagleTraining: a P-EAGLE draft and its training step."""

from speculators_cli.core.algorithms.eagle3.training import Eagle3Training
from speculators_cli.core.algorithms.peagle.config import PEagleConfig
from speculators_cli.core.algorithms.peagle.draft import PEagleDraft


class PEagleTraining(Eagle3Training, PEagleDraft):
    """A P-EAGLE draft that is trained on the verifier's distributions.

    Its TTT steps are the depths of the paper: step k predicts the token k + 1 ahead. Step k attends
    to the positions before its own as they were in step 0, and to the masks of the steps up to it:
    what a pass over the verified positions and k masks computes.
    """

    config: PEagleConfig
