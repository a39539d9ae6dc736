"""The modules that a compressed model runs."""

from oats.nn.sparse_low_rank_linear import SparseLowRankLinear as SparseLowRankLinear
from oats.nn.split_linear import SplitLinear as SplitLinear
