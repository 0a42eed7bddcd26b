"""The command line. Each command is a thin interface to `quant` or `localmimo`; app.py lists them."""
