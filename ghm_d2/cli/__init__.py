"""The commands: one file each, which parses its arguments and calls the libraries."""
