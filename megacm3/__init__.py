"""megacm3: pretraining, conversion and decoding of CM3Leon and Chameleon class models."""

__version__ = "0.1.0"
