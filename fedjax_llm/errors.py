"""The two kinds of error that a user meets; everything else is a defect of this package."""


class FedJaxError(Exception):
    """Base of the errors that this package raises on purpose. The message is one line."""

    exit_code = 1


class UserError(FedJaxError):
    """A mistake that the user can mend: a wrong key, a missing file, a bad value."""

    exit_code = 2


class Refused(FedJaxError):
    """A run that would break a privacy or security guarantee, and is therefore not started."""

    exit_code = 3
