"""PEagleTraining: a P-EAGLE draft and its training step."""

from torch import Tensor

from speculators_cli.core.algorithms.eagle3.training import Eagle3Training
from speculators_cli.core.algorithms.objective import weigh_as_one_mean
from speculators_cli.core.algorithms.peagle.config import PEagleConfig
from speculators_cli.core.algorithms.peagle.depths import DepthSampling
from speculators_cli.core.algorithms.peagle.draft import PEagleDraft
from speculators_cli.core.data.batch import Batch


class PEagleTraining(Eagle3Training, PEagleDraft):
    """A P-EAGLE draft that is trained on the verifier's distributions.

    Its TTT steps are the depths of the paper: step k predicts the token k + 1 ahead. Step k attends
    to the positions before its own as they were in step 0, and to the masks of the steps up to it:
    what a pass over the verified positions and k masks computes.
    """

    config: PEagleConfig
    sampling = DepthSampling()

    def draw(self, batch: Batch, *, seed: int, epoch: int) -> Batch:
        """The batch with the depths that its positions are trained at."""
        return self.sampling.draw(batch, self.config.ttt_steps, seed=seed, epoch=epoch)

    def normalise(self, loss_weights: Tensor, num_scored: Tensor) -> Tensor:
        """What a scored position weighs: the loss is one weighted mean over all depths."""
        return weigh_as_one_mean(loss_weights, num_scored)
