"""Errors that a user can mend: each message names the key, file or flag, its value, and the remedy."""


class AdaptiveError(Exception):
    """Base of every error that is shown as one line, without a traceback."""


class ConfigError(AdaptiveError, ValueError):
    """A configuration value is unknown, of the wrong type, out of range, or contradicts another one."""


class DataError(AdaptiveError):
    """A dataset, shard, index or image is missing, damaged, or does not fit the configuration."""


class ModelError(AdaptiveError, ValueError):
    """A backbone cannot be built, or cannot be cut where it was asked to be."""


class CheckpointError(AdaptiveError):
    """A checkpoint is missing, incomplete, damaged, or belongs to another run."""


class TrainingError(AdaptiveError):
    """Training cannot go on: the loss is not finite, or too many steps in a row were skipped."""


class MachineError(AdaptiveError):
    """This machine lacks what the run asks for: a device, disk space, a right, a program."""
