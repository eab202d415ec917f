"""The command line `endex`, and recipes to start it on one machine or many."""

from launch.main import main

__all__ = ["main"]
