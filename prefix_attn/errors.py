"""Exceptions and warnings of prefix_attn.

    PrefixAttnError
    ├── ShapeError          two sizes disagree, or a size is out of range      (also a ValueError)
    ├── DTypeError          a dtype or device is not supported or disagrees    (also a TypeError)
    ├── BackendUnavailable  a backend cannot run, or differentiate, this call  (also a RuntimeError)
    ├── UnknownTask         a task name or id is not in the bank               (also a LookupError)
    ├── IncompatiblePrefix  a prefix does not fit the model, or its file is bad (also a ValueError)
    ├── ContextOverflow     prefix + tokens exceed the model's context         (also a ValueError)
    ├── UnsupportedModel    the patch would not be exact for this model        (also a NotImplementedError)
    └── EngineFailed        of `prefix_attn.serving`: continuous batching ended

    UserWarning
    ├── SlowModel           served with a copy of the prefix in every row's cache
    ├── PaddingInWindow     padding takes room in a row's sliding windows
    └── RepeatedBOS         a prompt begins with BOS after a text that has begun so

Each message names the argument, what was expected, what was got, and what to do.
"""


class PrefixAttnError(Exception):
    """Base of every error this package raises on purpose."""


class ShapeError(PrefixAttnError, ValueError):
    """Two sizes disagree, or one is out of range."""


class DTypeError(PrefixAttnError, TypeError):
    """A dtype or a device is unsupported, or two arguments disagree on it."""


class BackendUnavailable(PrefixAttnError, RuntimeError):
    """The backend cannot run this call here, or give the derivative that is asked for; the message says why."""


class UnknownTask(PrefixAttnError, LookupError):
    """A task name or id is not in the bank; the message lists the choices."""


class IncompatiblePrefix(PrefixAttnError, ValueError):
    """A prefix does not fit the model (geometry, base weights, position mode), or its file is damaged."""


class ContextOverflow(PrefixAttnError, ValueError):
    """Prefix and tokens together exceed the positions the model has."""


class UnsupportedModel(PrefixAttnError, NotImplementedError):
    """The patch would not be exact for this model or this call, so it is refused."""


class SlowModel(UserWarning):
    """The model is served in the slow way: exact, but with a copy of its prefix in every row's cache."""


class PaddingInWindow(UserWarning):
    """Padding in front of a row takes room in its sliding windows, so that it sees less of its prefix than alone."""


class RepeatedBOS(UserWarning):
    """A prompt opens the sequence with its BOS token, behind a prefix that is a text and has opened it already."""
