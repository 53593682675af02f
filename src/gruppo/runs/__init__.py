"""Runs: their description, folder, data, session and what is measured on the way."""
