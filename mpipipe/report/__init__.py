"""Turns records of experiments, and runs, into tables, plots and one HTML page."""
