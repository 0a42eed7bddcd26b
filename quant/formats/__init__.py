"""How numbers become bytes: codecs, packed matrices and pages of one expert. Knows no file and no kernel."""
