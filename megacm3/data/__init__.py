"""From raw pairs to a token store, and from a token store to training sequences."""
