"""Heads on features, in seconds: arrays in, values out."""

from flaxtransfer.features.ridge import RidgePath, ridge_path

__all__ = ["RidgePath", "ridge_path"]
