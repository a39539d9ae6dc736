"""The exceptions that oats raises on purpose.

Each derives from :class:`OatsError` and from the built-in exception that fits, so ``except ValueError`` works
for callers who do not know this package.
"""

from __future__ import annotations


class OatsError(Exception):
    """Base of every exception that oats raises on purpose."""


class ConfigError(OatsError, ValueError):
    """A setting is out of range, or two settings contradict each other."""


class CalibrationError(OatsError, ValueError):
    """The calibration data is missing, too short, or does not fit the model."""


class WeightError(OatsError, ValueError):
    """A weight or a statistic of its inputs cannot be used: wrong shape or dtype, NaN or infinity."""


class FormatError(OatsError, ValueError):
    """Stored tensors disagree with each other, with their config, or with this version."""


class UnsupportedModelError(OatsError, ValueError):
    """The blocks of the model were not found, or nothing in them can be compressed."""


class CheckpointError(OatsError, ValueError):
    """A model was not found, or cannot be loaded."""


class OutputExistsError(OatsError, FileExistsError):
    """The output directory is not empty, and the caller did not ask to overwrite it."""


class QueueFullError(OatsError, RuntimeError):
    """The queue of a model is full, or the model takes no more requests."""


class DistributedError(OatsError, RuntimeError):
    """Another process of a distributed run has stopped or cannot be reached."""


class DeviceError(OatsError, RuntimeError):
    """No kernel supports the device that a tensor is on."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text that is not empty; its class where there is no text.

    >>> first_line(ValueError("\\n  too short\\nby far")), first_line(KeyboardInterrupt())
    ('too short', 'KeyboardInterrupt')
    """
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)
