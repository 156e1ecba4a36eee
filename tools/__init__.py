"""Command line tools over the package."""
