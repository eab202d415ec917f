"""The parts of `endex serve`: options, batches, live index, HTTP API."""

from launch.serving.config import ServeConfig

__all__ = ["ServeConfig"]
