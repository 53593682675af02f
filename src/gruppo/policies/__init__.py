"""Families of policies: what samples steps and says how likely they are."""
