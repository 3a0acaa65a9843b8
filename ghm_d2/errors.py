"""The one exception type that scripts turn into a single sentence instead of a traceback."""

__all__ = ["UserError"]


class UserError(ValueError):
    """A mistake in a command, config or data set; its message is one sentence with the way out."""
