"""From records to packs of tokens."""
