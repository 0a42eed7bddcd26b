"""Repl: the loop of a conversation: reads an entry, and asks it or runs it as a command.

Knows what an entry is; nothing of what a command does or of how an answer is made.
"""

from __future__ import annotations

from localmimo.cli.terminal.conversation import Conversation
from localmimo.cli.terminal.slash_commands import run_command


class Repl(Conversation):
    """A conversation that reads its entries."""

    def run(self) -> None:
        """Read and answer until the end of the input or /exit."""
        interrupts = 0
        while True:
            try:
                draft, self.draft = self.draft, ""
                entry = self.reader.read(draft)
            except KeyboardInterrupt:
                interrupts += 1
                if interrupts > 1:
                    self.ui.note("Ctrl-D or /exit leaves.", style="dim")
                continue
            interrupts = 0
            if entry is None:
                return
            if entry.startswith("/") and not entry.startswith("//"):
                if not run_command(self, entry):
                    return
            elif entry.strip():
                self.ask(entry[1:] if entry.startswith("//") else entry)
