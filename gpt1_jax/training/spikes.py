"""When a loss is a spike: far above those before it, by measures that a few of them cannot move."""

import statistics
from collections import deque
from collections.abc import Iterable

from gpt1_jax.config import SpikeConfig


class Spike(Exception):
    """A step's loss is far above those before it.

    Attributes:
        step: whose it is, the first being 1.
        loss: nats per token.
        median: of the losses before it.
        deviation: of those losses, the median distance from their median.
    """

    def __init__(self, step: int, loss: float, median: float, deviation: float):
        super().__init__(
            f"step {step}: loss {loss:.4f}, median {median:.4f}, median absolute deviation {deviation:.4f}"
        )
        self.step, self.loss, self.median, self.deviation = step, loss, median, deviation


class SpikeRule:
    r"""Follows the losses of a run, and raises what is a spike.

    With the median :math:`m` of the last W losses and the median :math:`d` of their distances from it, a loss is one
    above :math:`m + k d`. As long as there are fewer than W, none is. A few high losses move neither median, as they
    would a mean and a standard deviation, so the second step of a spike is judged as the first.

    Args:
        config: W and k; None: nothing is a spike, and no loss is remembered.
        losses: what :attr:`losses` was where the run goes on from.

    Attributes:
        losses: the last W.

    References:
        Leys et al. 2013, "Detecting outliers: Do not use standard deviation around the mean, use absolute deviation
        around the median".
    """

    def __init__(self, config: SpikeConfig | None, losses: Iterable[float] = ()):
        self._config = config
        self.losses = deque(losses, maxlen=config.window if config else 0)

    def judge(self, step: int, loss: float) -> None:
        """Takes the loss of the next step.

        Raises:
            Spike: if it is one.
        """
        if self._config and len(self.losses) == self._config.window:
            median = statistics.median(self.losses)
            deviation = statistics.median(abs(other - median) for other in self.losses)
            if loss > median + self._config.threshold * deviation:
                raise Spike(step, loss, median, deviation)
        self.losses.append(loss)
