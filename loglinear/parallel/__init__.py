"""What the program knows of other ranks, and how a model is spread over them."""

from loglinear.parallel.cut import local_batch
from loglinear.parallel.mesh import Mesh, lone_mesh, make_mesh
from loglinear.parallel.parallelize import parallel_model
from loglinear.parallel.world import World, start_world

__all__ = ["Mesh", "World", "local_batch", "lone_mesh", "make_mesh", "parallel_model", "start_world"]
