"""Runs that ship rows: on a GPU."""
