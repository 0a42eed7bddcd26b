"""Files of mimo-mini, the embedded model: a trained model of 32M parameters with the V2-Flash architecture.

A checkpoint in the released FP8 layout, its card (CARD.md) and held-out text for perplexity tests. Knows nothing of
packs or of how it is loaded.
"""

from pathlib import Path

NAME = "mimo-mini"
CHECKPOINT = Path(__file__).parent / NAME
HELD_OUT = Path(__file__).parent / "heldout.txt"
