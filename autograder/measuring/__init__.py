"""Runs that ship rows: of every method on both tasks, and on a GPU."""
