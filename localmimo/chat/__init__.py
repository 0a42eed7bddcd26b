"""Messages become tokens, and tokens become messages. Knows no model."""
