"""mimo-mini: the embedded miniature, a trained 32M-parameter model of the V2-Flash architecture.

Holds files only: a checkpoint in the released FP8 layout, its card (CARD.md) and held-out text for perplexity
tests. Knows nothing of packs or of how it is loaded.
"""

from pathlib import Path

NAME = "mimo-mini"
CHECKPOINT = Path(__file__).parent / NAME
HELD_OUT = Path(__file__).parent / "heldout.txt"
