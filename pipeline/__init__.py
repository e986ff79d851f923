"""Turnwise's library: everything that two stages need. See README.md for the map of every file."""

__version__ = "0.1.0"
