"""What later images are compared with: where the held-out ones leave by a policy."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from adaptive.inference.drift.counts import Counts
from adaptive.inference.outputs import simulate
from adaptive.inference.policy import Policy


def with_counts(policy: Policy, probabilities: Tensor | Sequence[Tensor]) -> Policy:
    """Return a calibrated policy that remembers where all held-out images leave, and how sure the exits are of them.

    Args:
        policy: with a calibration.
        probabilities: k x (N, C) of all of them, those that thresholds were chosen on included: choosing thresholds
            for accuracy or cost moves the shares on these very images by less than chance does, which
            tests/inference/drift/test_false_alarms.py measures.
    """
    assert policy.calibration is not None
    found = simulate(policy, probabilities)
    counts = Counts.of(found.exits, found.confidences, policy.exits)
    return policy.model_copy(update={"calibration": policy.calibration.model_copy(update={"seen": counts})})
