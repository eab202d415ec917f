"""Linear maps in front of a quantizer: one file a family. A new rotation is a class and one line of `ROTATIONS`."""

from retriever.transforms.rotations import ROTATIONS, Rotation, RotationName

__all__ = ["ROTATIONS", "Rotation", "RotationName"]
