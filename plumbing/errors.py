"""The one error that a user can mend."""


class UserError(ValueError):
    """Something that whoever runs the script can mend: shown as one line, without a traceback."""
