"""The command line. Each command is a thin face over `quant` or `localmimo`; app.py names them."""
