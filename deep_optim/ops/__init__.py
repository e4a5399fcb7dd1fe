"""Pure tensor functions on stacks of matrices `[..., m, n]`: the mathematics that the optimizers share."""
