"""Trained detectors outside training: files for other runtimes, predictions on one's own images."""
