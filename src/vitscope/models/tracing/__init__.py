"""Structure of a network from one traced forward pass: residual additions, branches and what they compute."""
