"""Every exception that the package raises on purpose.

All derive from :class:`OatsError`, and from the built-in exception that fits, so that
``except ValueError`` keeps working for callers who do not know this package.
"""

from __future__ import annotations


class OatsError(Exception):
    """Base of every exception that oats raises on purpose."""


class ConfigError(OatsError, ValueError):
    """A setting is out of range, or two settings contradict each other."""


class CalibrationError(OatsError, ValueError):
    """The calibration data is missing, too short, or does not fit the model."""


class WeightError(OatsError, ValueError):
    """A weight cannot be decomposed: wrong shape, wrong dtype, NaN or infinity."""


class FormatError(OatsError, ValueError):
    """Stored tensors disagree with each other, with their config, or with this version."""


class UnsupportedModelError(OatsError, ValueError):
    """The blocks of a model were not found, or nothing inside them can be compressed."""


class CheckpointError(OatsError, ValueError):
    """A model was not found, or cannot be loaded."""


class OutputExistsError(OatsError, FileExistsError):
    """The output directory is not empty, and overwriting was not asked for."""


class QueueFullError(OatsError, RuntimeError):
    """As many requests are waiting for a model as may wait, or it takes no more."""


class DistributedError(OatsError, RuntimeError):
    """A process of a run of several is gone, or cannot be reached."""


class DeviceError(OatsError, RuntimeError):
    """There are no kernels for the device that a tensor is on."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text that is not empty; its class where there is no text.

    >>> first_line(ValueError("\\n  too short\\nby far")), first_line(KeyboardInterrupt())
    ('too short', 'KeyboardInterrupt')
    """
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)
