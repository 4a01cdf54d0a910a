"""Engines at work: what is bound where, on which device, in how many ranks and stages.

The calls are those of TensorRT 11; what they act on is behind two small protocols (`device.Device`, `device.Peers`), so
that tests put host memory and an engine that computes with the NumPy interpreter in their place.
"""
