"""The model family: layers, blocks and the list of pipeline stages."""
