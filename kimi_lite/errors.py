"""Errors that kimi-lite raises on purpose, and the exit code that each one means.

Every text is meant for the person at the keyboard: which file or flag, what was found, what was expected,
what to do. Anything else that escapes is a bug of ours and exits with 1.
"""


class KimiLiteError(Exception):
    """Base of all errors we raise on purpose; exit code 1."""

    exit_code = 1


class UsageError(KimiLiteError):
    """An option, an argument or a request that cannot be served as asked; exit code 2."""

    exit_code = 2


class ModelFileError(KimiLiteError):
    """A model file or directory that is missing, damaged or of an unsupported kind; exit code 3."""

    exit_code = 3


class DoesNotFitError(KimiLiteError):
    """More memory or disk is needed than there is; exit code 4."""

    exit_code = 4


class KimiLiteWarning(UserWarning):
    """Something the user should know that does not stop the work, such as a configuration key we do not know."""
