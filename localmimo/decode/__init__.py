"""One sequence and its next tokens: sessions, drafts, sampling, grammars, stop rules, answers."""
