"""The processes that work on a run: one, or several that `torchrun` has started.

Each process has its own engines, and its own copy of the policy (with --shard, a part of it). It samples a share of the
questions, judges a share of the answers, and computes the gradient of a share of the rows. After each of these parts,
`gather` and `add_gradients` give all processes the whole result. So a step is the same up to rounding, whatever
the number of processes.
"""

import functools
import os
from collections.abc import Iterable

from tools import find


class Alone:
    """The only process of a run: nothing is shared out. `lab.torchrun.Team` takes its place under `torchrun`."""

    rank, world_size = 0, 1  # rank 0 writes the run's folder

    def share(self, rows: list) -> list:
        """This process's part of the rows."""
        return rows

    def gather(self, rows: list) -> list:
        """The rows of all processes, in their order. A process waits here for the others."""
        return rows

    def add_gradients(self, policy) -> None:
        """Make each gradient the sum over the processes."""

    def announce(self, policy, run) -> None:
        """Say how many processes there are, and what they send each other. All must see the same folder."""

    def weights(self, policy) -> Iterable:
        """(name, tensor) of each weight, for an engine."""
        return policy.state_dict().items()

    def snapshot(self, policy, optimizer) -> tuple[dict, dict]:
        """Weights and optimizer state, for a checkpoint."""
        return policy.state_dict(), optimizer.state_dict()

    def restore(self, policy, optimizer, weights, state) -> None:
        """Fill both with what `snapshot` gave."""
        policy.load_state_dict(weights)
        optimizer.load_state_dict(state)


@functools.cache
def team() -> Alone:
    """The processes of this run. `torchrun` says in WORLD_SIZE how many there are."""
    if "LOCAL_RANK" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
        return find("lab.torchrun.Team", {})()
    return Alone()
