"""The maths of MiMo-V2. Holds weights; knows no sequence, no budget and no user."""
