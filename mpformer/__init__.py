"""The core of mpformer: Mask2Former with mask piloting, its data and its trainer.

This module and :mod:`mpformer.config.schema` import no torch, so that planning and reporting start quickly.
"""

__version__ = "0.1.0"
