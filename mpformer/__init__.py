"""The core of mpformer: Mask2Former with mask piloting, its data and its trainer.

This module and :mod:`mpformer.config.schema` import no torch, so that planning and reporting start quickly.
"""

import warnings

# detectron2 0.6 scripts functions as it is imported, which newer torch warns of in every process
warnings.filterwarnings("ignore", message=r".*torch\.jit\.script. is deprecated", category=FutureWarning)

__version__ = "0.1.0"
