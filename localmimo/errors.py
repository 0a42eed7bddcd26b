"""The errors a user can meet, each a sentence: what failed, the two numbers that disagree, the next step.

Knows nothing of how they are shown: the command line turns each into one line and an exit code.
"""


class LocalMimoError(Exception):
    """Root of every error that localmimo raises on purpose."""


class DoesNotFit(LocalMimoError):
    """The model, context and budgets do not fit together."""


class NoDevice(LocalMimoError):
    """The GPU that was asked for is not there, or cannot be used."""


class BadModel(LocalMimoError):
    """A model's configuration, tokenizer or weights cannot be used."""


class BadRequest(LocalMimoError):
    """What was asked for makes no sense: an empty prompt, an unknown role, a negative temperature."""


class ContextFull(BadRequest):
    """A prompt needs more positions than the context has."""


class BadSession(LocalMimoError):
    """A saved session cannot be used: it is damaged, or belongs to another pack or other settings."""


class Cancelled(LocalMimoError):
    """Somebody asked the running computation to stop."""
