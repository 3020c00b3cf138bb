"""A device that does not exist: what a step would do on a GPU, counted on a machine without one.

:mod:`device` poses real values (or fake ones, shapes alone) as tensors of a foreign device; :mod:`training` runs the
trainer's own step on it, phase by phase.
"""
