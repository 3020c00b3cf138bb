"""The plain, direct implementation of Mask2Former and of mask piloting: the oracle for the product path.

Nothing clever on purpose: full-size mask logits for every query and layer, a Python loop over layers,
images and masks, ``nn.MultiheadAttention``, deformable attention through ``grid_sample``. Written from
the papers (Mask2Former, CVPR 2022; Deformable DETR, ICLR 2021; MP-Former, CVPR 2023) and from the notes on what
the public implementation does; it imports nothing of ``mpformer.modeling``. Only the typed
configuration and detectron2's ResNet are shared with the product.

Parameter names equal the released checkpoints, so that one state dict serves both.
"""
