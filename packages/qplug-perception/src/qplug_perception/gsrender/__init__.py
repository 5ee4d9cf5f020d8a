"""GSRender: occupancy of voxels as Gaussians that are rendered into cameras and so learned from 2D labels.

Source: https://arxiv.org/abs/2412.14579.  No code was released; what the paper does not say is marked [I] (inferred) where it is decided.

| file | what is in it |
|---|---|
| geometry.py | voxel grids, cameras, poses |
| gaussians.py | the head that makes one Gaussian of each voxel |
| render.py, render_reference.py | the rasterizer, and the same pixel by pixel |
| losses.py | depth, classes, ray compensation, dynamic objects |
| metrics.py | RayIoU |
| scenes.py | made-up streets with several cameras and neighbours in time |
| model.py | a small occupancy network that ends in the head |
| formats.py, compress.py, sweep.py | numbers of the attributes, the stored set, which attribute costs what |
"""
