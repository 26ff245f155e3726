"""What the program knows of other ranks."""

from loglinear.parallel.world import World, start_world

__all__ = ["World", "start_world"]
