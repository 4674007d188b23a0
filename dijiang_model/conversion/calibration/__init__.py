"""Which tokens a state has to keep: learned from one pass of the softmax teacher, without gradients."""
