"""Errors that the user can correct: the command-line tools print them as one line and exit with status 2."""


class UserError(ValueError):
    """Bad input. The message names the offending value and the next step, on one line."""


class UnknownNameError(UserError, KeyError):
    """A name that is in no registry. A KeyError too, because the registries are dictionaries."""

    __str__ = ValueError.__str__
