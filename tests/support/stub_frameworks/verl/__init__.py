"""Stands for verl where it is not installed."""
