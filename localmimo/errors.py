"""The errors a user can meet, each a sentence: what failed, the two numbers that disagree, the next step.

A sentence names the keywords of `load` as Python writes them (`ram=`); `with_flags` gives it as the command line says
it (`--ram`). Must not know how errors are shown: the command line turns each into one line and an exit code.
"""

import re

from quant.errors import BadPack as QuantBadPack

_KEYWORD = re.compile(r'\b(context|device|ram|vram)=("[\w:]+"|\w*)')


class LocalMimoError(Exception):
    """Root of every error that localmimo raises on purpose."""


class DoesNotFit(LocalMimoError):
    """The model, context and budgets do not fit together: `what` needs `needed_bytes` and has `budget_bytes`.

    The numbers are None where they are not known, as when a GPU runs out of memory.
    """

    def __init__(
        self,
        sentence: str,
        *,
        what: str = "",
        needed_bytes: int | None = None,
        budget_bytes: int | None = None,
    ) -> None:
        super().__init__(sentence)
        self.what = what
        self.needed_bytes = needed_bytes
        self.budget_bytes = budget_bytes


class NoDevice(LocalMimoError):
    """The GPU that was asked for is not there, or cannot be used."""


class BadPack(LocalMimoError, QuantBadPack):
    """The folder is no pack, half a pack, a damaged pack or one from a newer version."""


class BadModel(LocalMimoError):
    """A model's configuration, tokenizer or weights cannot be used."""


class BadRequest(LocalMimoError):
    """The request makes no sense: an empty prompt, an unknown role, a negative temperature."""


class ContextFull(BadRequest):
    """A prompt needs more positions than the context has. The numbers are None where they are not known."""

    def __init__(self, sentence: str, *, n_tokens: int | None = None, context: int | None = None) -> None:
        super().__init__(sentence)
        self.n_tokens = n_tokens
        self.context = context


class BadSession(LocalMimoError):
    """A saved session cannot be used: it is damaged, or belongs to another pack or other settings."""


class Cancelled(LocalMimoError):
    """Somebody asked the running computation to stop."""


def with_flags(sentence: object) -> str:
    """An error's sentence for the command line: `ram=2GiB` becomes `--ram 2GiB`, `context=` becomes `--context`."""
    return _KEYWORD.sub(lambda found: f"--{found[1]} {found[2]}".replace('"', "").rstrip(), str(sentence))
