"""What memory held at each step of a simulation."""

from dataclasses import dataclass

import numpy as np

STATES = ("used", "reserved", "internal", "external", "free")


@dataclass(frozen=True)
class Timeline:
    """What memory held after each of S steps.

    Fields:
      states: i64 [S,5], tokens in each of STATES.
      running, waiting: i64 [S], requests.
      preempted: how often a request gave way.
      recomputed: tokens whose keys and values were computed again for it.
    """

    states: np.ndarray
    running: np.ndarray
    waiting: np.ndarray
    preempted: int = 0
    recomputed: int = 0

    @classmethod
    def of(cls, pieces: list[np.ndarray], preempted: int = 0, recomputed: int = 0) -> "Timeline":
        """From arrays [steps, 7] of the states, running and waiting, one after another in time."""
        table = np.concatenate(pieces)
        return cls(table[:, :5], table[:, 5], table[:, 6], preempted, recomputed)

    @property
    def pressed(self) -> np.ndarray:
        """bool [S], the steps that count: a request waits. All of them where none ever did."""
        waits = self.waiting > 0
        return waits if waits.any() else ~waits

    def shares(self) -> dict[str, float]:
        """The mean share of memory in each state, under pressure."""
        means = self.states[self.pressed].mean(axis=0)
        return dict(zip(STATES, (means / means.sum()).tolist(), strict=True))

    def figures(self) -> dict[str, float]:
        """Shares of memory, used over what has an owner, mean of the requests running, steps, preemptions."""
        shares = self.shares()
        return dict(
            effective_use=shares["used"],
            **shares,
            used_of_owned=shares["used"] / (shares["used"] + shares["reserved"] + shares["internal"]),
            running=float(self.running[self.pressed].mean()),
            steps=len(self.running),
            preempted=self.preempted,
            recomputed=self.recomputed,
        )
