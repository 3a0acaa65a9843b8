"""Annotations that a detector does not believe: found, shown, marked, dropped or mended."""
