"""Chat: messages become tokens, and generated text becomes messages. Knows no model."""
