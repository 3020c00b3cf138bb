"""Numbers and pictures from decoder layers, on plain tensors of a DETR-like segmentation model.

This module imports no torch. The tensor modules do: :mod:`~analysis.matching`, :mod:`~analysis.layers`,
:mod:`~analysis.recorder`, :mod:`~analysis.masks` and :mod:`~analysis.gradients`.
:mod:`~analysis.layer_table`, :mod:`~analysis.scores`, :mod:`~analysis.statistics` and :mod:`~analysis.figures` work on
files, without it.

Letters in every docstring: A = L + 1 prediction layers (0: the bare learnable queries, L: the last), Q queries, C
classes, D mask embedding width, h × w cells of the mask features, n ground-truth objects of the image.
"""
