"""When the frames of a video are on screen, and at what rate."""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

MILLISECOND = Fraction(1, 1000)
#: Frames by which a rate must be nearer to the times of all frames than one that the header gives.
SMALL_ERROR = 0.05


@dataclass(frozen=True)
class FrameTimes:
    """When frames are on screen, in ticks of presentation time: at tick 0, a player's clock shows 0.

    Args:
        starts: `(frames,)`, int64, ascending. A frame stays until the next one starts.
        end: When the last frame is taken off.
        tick: Seconds of a tick.
        announced_rates: Frames per second as the header gives them. All may be wrong.
    """

    starts: np.ndarray
    end: int
    tick: Fraction
    announced_rates: tuple[Fraction, ...] = ()

    @property
    def seconds(self) -> np.ndarray:
        """`(frames,)`: when each frame appears."""
        return self.starts * float(self.tick)

    @property
    def end_seconds(self) -> float:
        return self.end * float(self.tick)

    def stays(self) -> np.ndarray:
        """`(frames,)`: seconds for which each frame is on screen."""
        return np.diff(self.seconds, append=self.end_seconds)

    def constant_rate(self) -> tuple[float, int] | None:
        """`(rate, first)`, if each frame `i` appears within half a frame of `(first + i) / rate` seconds."""
        count, seconds = len(self.starts), self.seconds
        span = seconds[-1] - seconds[0] if count > 1 else self.end_seconds - seconds[0]
        measured = float(max(1, count - 1) / span) if span > 0 else 0.0
        found = None
        least = 0.5 + SMALL_ERROR
        for rate in filter(None, (*map(float, self.announced_rates), measured)):
            places = seconds * rate - np.arange(count)
            first = round((places.min() + places.max()) / 2)
            error = np.abs(places - first).max()
            # A last frame that is held for long is none of a constant rate.
            if error < least - SMALL_ERROR and self.end_seconds * rate <= first + count + 1:
                found, least = (rate, first), error
        return found

    def grid_rate(self) -> float:
        """Places per second of a regular grid on which all frames lie.

        That is a rate the header gives, if the video is one of this rate without some of its frames, else 1000.
        """
        for rate in map(float, self.announced_rates):
            if np.abs(self.seconds * rate - np.round(self.seconds * rate)).max() <= 2 * SMALL_ERROR:
                return rate
        return float(1 / MILLISECOND)
