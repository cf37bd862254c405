"""Corpora: how they are read, made and shared out among the splits."""
