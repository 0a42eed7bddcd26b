"""Will it fit, and how fast will it be: arithmetic before anything is loaded. No torch."""
