"""How a pack is opened: the keywords of `load`, the plan, the embedded model, the parts of an engine."""
