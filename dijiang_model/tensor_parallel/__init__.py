"""One network over several processes, each with a part of every layer's heads, states and projections.

Rank r of N holds the r-th part of the key-value heads with their query heads, of the MLP's inner width and of the
vocabulary; what is as wide as the hidden state (norms, biases behind a sum, learned positions) is on every rank.
A layer costs two sums over the ranks as wide as the hidden state, or one where attention and MLP read the same input
(GPT-NeoX's parallel residual); the states never travel.
"""
