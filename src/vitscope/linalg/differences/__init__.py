"""Products with the Hessian by finite differences of the gradient, for networks that cannot be differentiated twice."""
