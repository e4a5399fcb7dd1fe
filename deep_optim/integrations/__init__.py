"""Trainers that want more than an optimizer; each module imports its library where it is used."""
