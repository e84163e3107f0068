"""Structure of a network from one traced forward pass: residual additions, branches and what they compute."""

import vitscope.models.structure  # noqa: F401  loaded first: it imports this package's modules
