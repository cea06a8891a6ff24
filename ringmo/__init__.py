"""RingMo: remote-sensing foundation models trained, judged and kept in production."""

__version__ = "0.1.0"
