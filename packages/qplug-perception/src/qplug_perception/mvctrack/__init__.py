"""MVCTrack: a voxel tracker of one object in LiDAR, helped by virtual points from cameras.

Source: https://arxiv.org/abs/2412.02734.  Where the paper and the released code differ, the decision and its reason stand where it is made;
what neither says is marked [I] (inferred).

| file | what is in it |
|---|---|
| virtual_points.py | MVCP: virtual points out of instance masks and the LiDAR points inside them |
| boxes.py | rotated boxes, their 3-D intersection over union, Success and Precision |
| nuscenes.py | frames, calibrations and boxes of a nuScenes folder; files of virtual points |
| voxels.py, tracker.py, flow.py | crops as voxels, the network, its likelihood |
| sequences.py | made-up sequences: a cuboid before a LiDAR and a camera |
"""
