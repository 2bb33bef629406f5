"""Temper-Then-Tilt."""
