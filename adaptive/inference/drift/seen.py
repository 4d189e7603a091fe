"""`Seen`: what a policy has seen in use, kept in a file that several processes add to; no torch here."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from adaptive.errors import PolicyError, reason_of
from adaptive.files import write_atomically
from adaptive.inference.drift.counts import Array, Counts, Tally
from adaptive.inference.frozen_model import FrozenModel
from adaptive.inference.policy import Policy

PATIENCE = 60.0  # seconds to wait for another process that adds to the same file


class Seen(FrozenModel):
    """Counts of the images that a policy has let go, with what tells the policy from others.

    `DynamicClassifier` and `OnnxClassifier` keep them when asked, ``adaptive predict --seen FILE`` adds them to a file,
    and ``adaptive policy check`` compares them with the images of the calibration.
    """

    policy: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """A digest of all that decides: kind, thresholds, temperatures, gates and the network's fingerprint."""
    thresholds: list[float]
    """The policy's, for messages."""
    counts: Counts
    version: Literal[1] = 1

    @classmethod
    def of(cls, policy: Policy, counts: Counts | None = None) -> Seen:
        """Counts of a policy's images; none yet unless given."""
        counts = counts or Counts.none(policy.exits)
        return cls(policy=policy_digest(policy), thresholds=policy.thresholds, counts=counts)

    @property
    def images(self) -> int:
        """How many images were counted."""
        return self.counts.images

    @property
    def shares(self) -> list[float]:
        """Share of the images (k,) that left at each exit; NaN where there are none."""
        images = self.images
        return [count / images if images else float("nan") for count in self.counts.leaving]

    def __add__(self, other: Seen) -> Seen:
        """Return the counts of both (raises PolicyError where they are of two policies)."""
        if self.policy != other.policy:
            raise PolicyError(
                f"counts of two policies, with thresholds {_listed(self.thresholds)} and {_listed(other.thresholds)}; "
                "keep those of each in a file of its own"
            )
        return self.model_copy(update={"counts": self.counts + other.counts})

    def check(self, policy: Policy, name: str = "these counts", owner: str = "this policy") -> None:
        """Refuse counts that another policy's images gave (PolicyError).

        Args:
            policy: whose they have to be.
            name: of the counts, for the message.
            owner: of the policy, for the message.
        """
        if self.policy != policy_digest(policy):
            raise PolicyError(
                f"{name}: counts of another policy (thresholds {_listed(self.thresholds)}) than {owner} (thresholds "
                f"{_listed(policy.thresholds)}); begin another file for it"
            )

    def save(self, path: str | Path) -> None:
        """Write it as JSON, atomically."""
        write_atomically(Path(path), self.model_dump_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Seen:
        """Read what `save` or `add_to` wrote (raises PolicyError)."""
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise PolicyError(
                f"counts {path} cannot be read ({error.strerror}); make them with: adaptive predict RUN IMAGE... "
                "--seen FILE"
            ) from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "content"
            raise PolicyError(f"{path} holds no counts: {where}: {first['msg']}; give another file") from None

    def add_to(self, path: str | Path) -> Seen:
        """Add these counts to those in a file, which is made if needed, and return the sum.

        The file is replaced as a whole while a lock beside it keeps other writers out, so that none of several
        processes loses its counts, and who reads never sees a part.

        Raises:
            PolicyError: the file holds something else, or counts of another policy; it stays as it was. It cannot be
                written, or somebody else has been writing it for a minute.
        """
        from adaptive.locks import Lock, LockHeldError

        path = Path(path)
        try:
            with Lock(path.with_name(f".{path.name}.lock")).acquire(PATIENCE):
                total = self
                if path.exists():
                    total = Seen.load(path) + self
                total.save(path)
        except LockHeldError as error:
            raise PolicyError(f"{path}: {reason_of(error)}; give each process a file of its own") from None
        except OSError as error:
            raise PolicyError(f"counts {path} cannot be written: {error.strerror}; choose another file") from None
        return total


class Watch:
    """What a runner keeps of the images that its policy lets go.

    Args:
        policy: of the runner.
        before: counts to go on from.

    Raises:
        PolicyError: they are another policy's.
    """

    def __init__(self, policy: Policy, before: Seen | None = None) -> None:
        self._before = Seen.of(policy) if before is None else before
        self._before.check(policy)
        self._policy, self._tally = policy, Tally(policy.exits)

    @classmethod
    def asked(cls, policy: Policy, seen: Seen | bool) -> Watch | None:
        """Make one as a runner's argument ``seen`` says."""
        return None if seen is False else cls(policy, None if seen is True else seen)

    def add(self, exits: Array, confidences: Array) -> None:
        """Count images (N,); a device is not waited for."""
        self._tally.add(exits, confidences)

    @property
    def seen(self) -> Seen:
        """All so far."""
        return self._before + Seen.of(self._policy, self._tally.counts())


def kept(watch: Watch | None) -> Seen:
    """Return what a runner has seen (raises PolicyError where it was not asked to count)."""
    if watch is None:
        raise PolicyError("this runner keeps no counts; make it with seen=True")
    return watch.seen


def policy_digest(policy: Policy) -> str:
    """Return a sha256 of all that makes a policy decide as it does."""
    network = policy.network.fingerprint if policy.network else None
    parts = [policy.kind, policy.thresholds, policy.temperatures, [gate.model_dump() for gate in policy.gates], network]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _listed(thresholds: list[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in thresholds[:-1]) or "none"
