"""Finds annotations that a detector does not believe; shows, marks, drops or mends them."""
