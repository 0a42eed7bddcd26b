"""Which pages are worth keeping: statistics, forecasts, traces. Pure; no torch."""
