"""Checkpoint families: tables of tensor names and config translations."""
