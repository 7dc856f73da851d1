"""Theory as executable checks: gradient flow, surrogates of SGD and closed-form predictions."""
