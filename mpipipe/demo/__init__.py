"""The demo model: fetched from a package, converted once."""
