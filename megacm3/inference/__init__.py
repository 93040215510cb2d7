"""The decoder over an exported folder."""
