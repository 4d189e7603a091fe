"""In-sample figures: whether the images that were measured are those that chose the policy or the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from adaptive.inference.policy import Policy

REMEDY = "measure on images that chose nothing: split test (--hold-out-test M of pack sets them aside)"


@dataclass(frozen=True)
class InSample:
    """What the measured images had chosen before.

    Attributes:
        checkpoint: the weights, as the best by their accuracy.
        policy: the policy.
        tested: half of them chose it, and the other half tested it.
    """

    checkpoint: bool = False
    policy: bool = False
    tested: bool = False

    def __bool__(self) -> bool:
        return self.checkpoint or self.policy

    @property
    def chose(self) -> list[str]:
        """What they chose, by name."""
        return [name for name in ("checkpoint", "policy") if getattr(self, name)]

    @property
    def headline(self) -> str:
        """The mark of a table, a figure or a page; empty where the images chose nothing."""
        if not self:
            return ""
        if self.policy and self.tested:
            also = " (and all of them the checkpoint)" if self.checkpoint else ""
            return f"in-sample: half of these images chose the policy, the others tested it{also}"
        return f"in-sample: these images chose the {' and the '.join(self.chose)}"


NOTHING = InSample()


def policy_on(policy: Policy | None, split: str, dataset: str, trained_on: str) -> InSample:
    """Say whether a policy was chosen on the images of a split.

    Args:
        policy: of the run, if any.
        split: that is measured.
        dataset: the fingerprint of its dataset.
        trained_on: that of the run's, which a policy of an earlier version, that does not name its own, is taken for.
    """
    calibration = policy.calibration if policy else None
    if calibration is None or calibration.split != split or (calibration.dataset or trained_on) != dataset:
        return NOTHING
    return InSample(policy=True, tested=calibration.evidence is not None or "epsilon" in calibration.target)
