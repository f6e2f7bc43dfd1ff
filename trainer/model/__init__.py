"""Decoder-only transformer: single-device code without any distributed import."""
