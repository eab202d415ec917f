"""Recipes for a Ray cluster; Ray is imported only when one runs."""

from launch.ray.export import encode_shard
from launch.ray.serve import best_of

__all__ = ["best_of", "encode_shard"]
