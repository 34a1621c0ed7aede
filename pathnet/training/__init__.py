"""Training that resumes bit for bit: one recipe, one loop, one checkpoint file.

Stochastic depth and effective training (sections 6 and 5 of the paper) draw the residual modules that take part in
each step. The forward and the backward pass skip the other modules. The draw depends on seed and step alone, so all
processes of a distributed training skip the same modules. Residual blocks run through the fused kernels of
`pathnet.nn` where an engine serves them.
"""

from pathnet.training.evaluation import evaluate
from pathnet.training.loop import Progress, train
from pathnet.training.position import Epoch
from pathnet.training.recipe import Recipe

__all__ = ["Epoch", "Progress", "Recipe", "evaluate", "train"]
