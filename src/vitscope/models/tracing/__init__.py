"""Structure of a network from one traced forward pass: residual additions, branches and what they compute."""

from vitscope.models import structure as structure  # loaded first: it imports this package's modules
