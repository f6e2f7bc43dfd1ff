"""Engines: one sharded model and its optimizer behind one protocol (`engine.Engine`)."""
