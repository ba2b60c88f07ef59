"""Programs that hold pygen against what it replaces."""
